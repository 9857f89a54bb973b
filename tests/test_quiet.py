import subprocess
import sys

from PIL import Image

# As the command line does, with a picture that Pillow warns of, and one that it logs an error about.
LOAD = """
import sys
from pathlib import Path
from PIL import Image
from lowvram_db.errors import UserError
from lowvram_db.photos import load_photo
from lowvram_db.quiet import quiet_libraries
quiet_libraries()
Image.MAX_IMAGE_PIXELS = 1000
load_photo(Path("large.png"))
try:
    load_photo(Path("samples.tif"))
except UserError as error:
    print(error)
"""


def test_what_pillow_finds_odd_in_a_photo_is_not_on_the_console(tmp_path):
    Image.new("L", (40, 30)).save(tmp_path / "large.png")
    Image.new("L", (8, 8)).save(tmp_path / "samples.tif", tiffinfo={277: 128})  # samples of a pixel
    done = subprocess.run([sys.executable, "-c", LOAD], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.startswith("samples.tif: not an image that Pillow can read")
