"""Photos in any mode Pillow reads -> upright 8-bit RGB in sRGB."""

import contextlib
import functools
import io
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL
import psutil
from PIL import Image, UnidentifiedImageError

from lowvram_db.colour import to_srgb
from lowvram_db.errors import UserError
from lowvram_db.image_file import orientation, take_apart
from lowvram_db.progress import say

DECODER = f"2, Pillow {PIL.__version__}"  # what a file's pixels depend on besides its bytes

# Windows' own files in folders of pictures, and what phones and programs write about a picture beside it.
_NOT_MEANT = {"thumbs.db", "ehthumbs.db", "desktop.ini"}
_SIDECARS = {".json", ".xmp", ".aae", ".jsonl", ".txt", ".caption"}  # captions among them
_MASK = ".mask.png"  # the end of the name of a photo's mask
_ONLY_KNOWN = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # formats that Pillow has no decoder of its own for
_MOST_NAMES = 3

Colour = tuple[int, int, int, int]
_WHITE, BLACK = (255, 255, 255, 255), (0, 0, 0, 255)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # that make a picture of each EXIF orientation upright
# What a pixel takes while it is decoded: Pillow keeps RGB in 4 bytes, four times while it lays a picture over white.
_DECODING_BYTES = 16
_raised_limit = threading.Lock()
_say_once = functools.cache(say)  # a folder is looked at several times in a run


def find_photos(folder: Path, key: str) -> list[Path]:
    """As list_photos, for a folder that must hold some. `key` is the setting that named it.

    Raises UserError when the folder is missing or holds no photo that Pillow reads.
    """
    with _refusing(folder):
        if not folder.is_dir():
            what = "is a file; give the folder it is in" if folder.is_file() else "does not exist"
            raise UserError(f"{key}: {folder.absolute()} {what}")
    photos, passed_over = _look_into(folder)
    if not photos:
        none = f"{key}: no photos in {folder.absolute()}"
        if below := folders_below(folder.absolute()):
            counts = ", ".join(f"{len(_look_into(each)[0])} in {each}" for each in below[:_MOST_NAMES])
            raise UserError(f"{none} itself; there are {counts}: name the folder that they are in")
        raise UserError("; ".join([none, *passed_over]))
    _say_passed_over(folder, passed_over)
    return photos


def list_photos(folder: Path) -> list[Path]:
    """The image files in a folder that exists, by name. Others are passed over, which is said once.

    Raises UserError when the folder cannot be read.
    """
    photos, passed_over = _look_into(folder)
    _say_passed_over(folder, passed_over)
    return photos


def mask_of(photo: Path) -> Path | None:
    """The mask of a photo, if it has one."""
    return next((mask for name in _mask_names(photo) if (mask := photo.with_name(name)).is_file()), None)


def _mask_names(photo: Path) -> tuple[str, str]:
    return photo.stem + _MASK, photo.name + _MASK


def folders_below(folder: Path) -> list[Path]:
    """The folders in a folder that hold pictures themselves, by name. Raises UserError when it cannot be read."""
    readable = _readable_suffixes()
    found = []
    with _refusing(folder):
        for below in _shown(folder):
            with contextlib.suppress(OSError):  # one that the user may not look into
                if below.is_dir() and any(_is_picture(file, readable) for file in _shown(below)):
                    found.append(below)
    return found


def _look_into(folder: Path) -> tuple[list[Path], list[str]]:
    """The photos in a folder, and what is passed over, by kind."""
    readable = _readable_suffixes()
    photos, foreign, broken, masks = [], [], [], []
    with _refusing(folder):
        for file in _shown(folder):
            if file.name.endswith(_MASK):
                masks.append(file)
            elif _is_picture(file, readable):
                photos.append(file)
            elif file.is_symlink() and not file.exists():
                broken.append(file)
            elif file.is_file() and file.name.lower() not in _NOT_MEANT and file.suffix.lower() not in _SIDECARS:
                foreign.append(file)
    masked = {name for photo in photos for name in _mask_names(photo)}
    masks = [mask for mask in masks if mask.name not in masked]
    passed_over = [
        (foreign, "in formats that Pillow cannot read", "; convert photos among them to JPEG or PNG"),
        (broken, "linked to what is not there", ""),
        (masks, "masks of no photo that is there", ""),
    ]
    return photos, [f"{len(files)} {what} ({_some(files)}){mend}" for files, what, mend in passed_over if files]


@contextlib.contextmanager
def _refusing(folder: Path) -> Iterator[None]:
    """What the system says of a folder that it does not give, as a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); allow it or name another folder") from error


def _shown(folder: Path) -> list[Path]:
    """What is in a folder and not hidden, by name."""
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _is_picture(file: Path, readable: set[str]) -> bool:
    return file.suffix.lower() in readable and file.is_file()


def _readable_suffixes() -> set[str]:
    suffixes = Image.registered_extensions()  # loads Pillow's plugins, which may also be writers only
    return {suffix for suffix, kind in suffixes.items() if kind in Image.OPEN.keys() - _ONLY_KNOWN}


def _some(files: list[Path]) -> str:
    return ", ".join([file.name for file in files[:_MOST_NAMES]] + ["..."] * (len(files) > _MOST_NAMES))


def _say_passed_over(folder: Path, passed_over: list[str]) -> None:
    if passed_over:
        _say_once(f"{folder.absolute()}: passed over: {'; '.join(passed_over)}")


def load_photo(path: Path, ground: Colour = _WHITE) -> Image.Image:
    """One photo as upright RGB in sRGB, 8 bits a channel: the first frame, EXIF orientation applied, alpha over the
    ground, which is white unless it is given.

    Raises UserError naming the file when it is not there, is no image, is cut off, or does not fit into memory.
    """
    return _decode_over(ground, read_photo(path), path)[0]


def load_turned(path: Path) -> tuple[Image.Image, bool]:
    """As load_photo, and whether its EXIF says that it had to be turned upright."""
    return _decode_over(_WHITE, read_photo(path), path)


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
    return _decode_over(_WHITE, content, path)[0]


def _decode_over(ground: Colour, content: bytes, path: Path) -> tuple[Image.Image, bool]:
    try:
        try:
            return _decode(content, ground)
        except Image.DecompressionBombError:
            with _pixel_limit_by_memory():
                return _decode(content, ground)
    except UnidentifiedImageError as error:
        raise UserError(f"{path}: not an image that Pillow can read; remove it or convert it") from error
    except (Image.DecompressionBombError, MemoryError) as error:
        raise UserError(f"{path}: has more pixels than there is memory to decode; scale it down") from error
    except Exception as error:  # Pillow's decoders report damage as nearly any, by format
        what = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: damaged or cut off ({what}); replace or remove it") from error


def _decode(content: bytes, ground: Colour) -> tuple[Image.Image, bool]:
    """And whether it was turned upright."""
    file = take_apart(content)
    with Image.open(io.BytesIO(file.pixels)) as opened:
        opened.load()
        exif = file.exif or opened.info.get("exif", b"")
        profile = file.profile or opened.info.get("icc_profile") or b""
        photo = _flatten(to_srgb(_to_8_bits(opened), profile), ground)
    photo.info = {}  # a profile and an orientation that hold no longer
    turn = _TURNS.get(orientation(exif))
    return (photo, False) if turn is None else (photo.transpose(turn), True)


@contextlib.contextmanager
def _pixel_limit_by_memory() -> Iterator[None]:
    """Pillow's limit as high as memory allows.

    Its own, 179 megapixels, is below the 200 that phones make. It is the process's: raised for one picture after the
    other, only while one that exceeds it is decoded, and never lowered, so that other threads are refused nothing.
    """
    with _raised_limit:
        before = Image.MAX_IMAGE_PIXELS
        in_memory = psutil.virtual_memory().available // _DECODING_BYTES
        if before is not None:
            Image.MAX_IMAGE_PIXELS = max(before, in_memory // 2)  # Pillow refuses from twice this on
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


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


def _flatten(image: Image.Image, ground: Colour) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    with_alpha = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", with_alpha.size, ground), with_alpha).convert("RGB")
