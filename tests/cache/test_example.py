import subprocess
import sys

import pytest

from lowvram_db.photos import load_photo


@pytest.mark.slow
def test_the_example_in_the_docs_runs_and_is_quicker_the_second_time(miniature, photo_files, tmp_path, request):
    load_photo(photo_files[0]).resize((160, 96)).save(photo_files[0])
    command = [sys.executable, request.config.rootpath / "docs" / "cache_example.py", "--steps", "6",
               "--resolution", "64", "--model", miniature, "--photos", photo_files[0].parent,
               "--cache", tmp_path / "cache"]  # fmt: skip
    first, second = (subprocess.run(command, capture_output=True, text=True) for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    *steps, last = first.stdout.splitlines()
    assert last == "5 photos cached; whole"
    assert {line.split(": ")[1].split(",")[0] for line in steps} == {"64x64", "80x48"}
    assert len(steps) == 6
    shards = sorted((tmp_path / "cache" / "v3").glob("*.safetensors"))
    assert shards and "Loading weights" not in second.stderr, "an encoder was loaded though nothing was missing"
