"""Photos in any mode Pillow reads -> upright 8-bit RGB."""

import io
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageOps, UnidentifiedImageError

from lowvram_db.errors import UserError

# Photo formats people have that Pillow reads only with a plugin, or not at all.
_FOREIGN_FORMATS = {".heic", ".heif", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"}
_WHITE = (255, 255, 255, 255)

DECODER = f"1, Pillow {PIL.__version__}"  # what a file's pixels depend on besides its bytes


def find_photos(folder: Path, key: str) -> list[Path]:
    """The image files in a folder, by name; other files are passed over. `key` is the setting that named the folder.

    Raises UserError when the folder is missing or holds no photo, or one in a format that Pillow cannot read.
    """
    if not folder.is_dir():
        what = "is a file; give the folder it is in" if folder.is_file() else "does not exist"
        raise UserError(f"{key}: {folder.absolute()} {what}")
    photos = list_photos(folder)
    if not photos:
        raise UserError(f"{key}: no photos in {folder.absolute()}")
    return photos


def list_photos(folder: Path) -> list[Path]:
    """As find_photos, for a folder that exists and may hold none."""
    readable = Image.registered_extensions()
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    for file in files:
        if file.suffix.lower() in _FOREIGN_FORMATS - readable.keys():
            raise UserError(f"{file}: Pillow cannot read {file.suffix} files; convert it to JPEG or PNG")
    return [file for file in files if file.suffix.lower() in readable]


def folders_below(folder: Path) -> list[Path]:
    """Folders in a folder that hold photos."""
    return [below for below in sorted(folder.glob("*/")) if list_photos(below)] if folder.is_dir() else []


def load_photo(path: Path) -> Image.Image:
    """One photo as upright RGB, 8 bits a channel: the first frame, EXIF orientation applied, alpha over white.

    Raises UserError naming the file when it is not there, is no image, is cut off, or is too large to be a photo.
    """
    return decode_photo(read_photo(path), path)


def read_photo(path: Path) -> bytes:
    """A photo's bytes. Raises UserError naming the file when it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path}: is not there any more; bring it back, or run the command again without it") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); replace or remove it") from error


def decode_photo(content: bytes, path: Path) -> Image.Image:
    """As load_photo, from bytes that were read from `path`."""
    try:
        with Image.open(io.BytesIO(content)) as opened:
            opened.load()
            return _flatten(_to_8_bits(ImageOps.exif_transpose(opened)))
    except UnidentifiedImageError as error:
        raise UserError(f"{path}: not an image that Pillow can read; remove it or convert it") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: has too many pixels to be a photo ({error}); scale it down") from error
    # Pillow's decoders report damage as any of these, by format
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError) as error:
        raise UserError(f"{path}: damaged or cut off ({error}); replace or remove it") from error


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey images of 16 or 32 bits or of floats, scaled by the smallest full scale that holds their brightest pixel.

    Pillow's own conversion would clip them at 255.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image).astype(np.float64)
    brightest = values.max(initial=0)
    # An integer image with nothing above 1 is black, not a mask; a float image usually runs from 0 to 1.
    scales = [255.0, 65535.0, 2.0**32 - 1] if image.mode.startswith("I") else [1.0, 255.0, 65535.0, brightest]
    if image.mode.startswith("I;16"):
        scales = [65535.0]
    full_scale = next(scale for scale in scales if brightest <= scale)
    return Image.fromarray(np.clip(np.rint(values * (255.0 / full_scale)), 0, 255).astype(np.uint8))


def _flatten(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    with_alpha = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", with_alpha.size, _WHITE), with_alpha).convert("RGB")
