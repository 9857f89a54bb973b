"""An image file taken apart: the bytes that make its pixels, its EXIF block, its colour profile.

Pillow looks into every block of a JPEG or PNG when it opens it, and refuses the whole picture where one of them is odd:
compressed text of more than 1 MiB, a resolution of a wrong type. It is given only the blocks that make pixels; of the
others two are read here, no further than they are needed. Nothing here raises: what is cut off or malformed goes to
Pillow as it is.
"""

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the latter two are BigTIFF's
_RAW_EXIF = b"Raw profile type exif\0"  # where ImageMagick wrote EXIF before PNG had a chunk for it
_ORIENTATION = 0x0112
_INTEGERS = {1: "B", 3: "H", 4: "L", 6: "b", 8: "h", 9: "l"}  # TIFF's field types that are one
# Compressed blocks are unpacked no further than this. Profiles of printing presses take a few MiB.
_LARGEST_BLOCK = 32 << 20


class ImageFile(NamedTuple):
    """The parts of one file; `exif` and `profile` are empty where it has none, or where only Pillow finds them."""

    pixels: bytes  # a file of the same format
    exif: bytes  # a TIFF block
    profile: bytes  # ICC


def take_apart(content: bytes) -> ImageFile:
    """The parts of an image file of any format. The memory taken is that of the file, and 32 MiB."""
    if content.startswith(_JPEG):
        return _take_jpeg_apart(content)
    if content.startswith(_PNG):
        return _take_png_apart(content)
    if content.startswith(_TIFF):
        return ImageFile(_not_turned(content), content, b"")
    return ImageFile(content, b"", b"")


def orientation(exif: bytes) -> int:
    """How a picture is stored, 1 (upright) to 8, as EXIF 2.32 numbers it; 1 where an EXIF block does not say."""
    exif = exif.removeprefix(b"Exif\0\0")
    field = _orientation_field(exif)
    value = struct.unpack_from(field[1], exif, field[0])[0] if field else 1
    return value if 1 <= value <= 8 else 1


def _orientation_field(tiff: bytes) -> tuple[int, str] | None:
    """Where in a TIFF block the first directory's orientation is, and its struct format. Other fields are not read."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return None
    big = tiff[2:4] in (b"+\0", b"\0+")
    try:
        directory = struct.unpack_from(f"{order}Q" if big else f"{order}L", tiff, 8 if big else 4)[0]
        if directory >= len(tiff):
            return None
        fields = struct.unpack_from(f"{order}Q" if big else f"{order}H", tiff, directory)[0]
        first, size, value = (directory + 8, 20, 12) if big else (directory + 2, 12, 8)
        for start in range(first, first + min(fields, 0xFFFF) * size, size):
            tag, kind = struct.unpack_from(f"{order}HH", tiff, start)
            if tag == _ORIENTATION and kind in _INTEGERS and start + size <= len(tiff):
                return start + value, order + _INTEGERS[kind]
    except struct.error:  # cut off
        pass
    return None


def _not_turned(tiff: bytes) -> bytes:
    """The same TIFF, said to be upright: Pillow turns others as it loads them, and fails over their other tags."""
    field = _orientation_field(tiff)
    if field is None or orientation(tiff) == 1:
        return tiff
    return tiff[: field[0]] + struct.pack(field[1], 1) + tiff[field[0] + struct.calcsize(field[1]) :]


def _take_jpeg_apart(content: bytes) -> ImageFile:
    kept, exif, pieces = [content[:2]], b"", dict[int, bytes]()
    end = 2
    for marker, start, end in _jpeg_segments(content):
        body = content[start + 4 : end]
        if marker == 0xE1 and body.startswith(b"Exif\0\0"):
            exif = exif or body
        elif marker == 0xE2 and body.startswith(b"ICC_PROFILE\0") and len(body) > 14:
            pieces.setdefault(body[12], body)
        if _makes_jpeg_pixels(marker, body):
            kept.append(content[start:end])
    kept.append(content[end:])
    return ImageFile(b"".join(kept), exif, _joined(pieces))


def _jpeg_segments(content: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of each segment before the first scan, as far as they are whole."""
    start = 2
    while len(marker := content[start : start + 2]) == 2 and marker[0] == 0xFF:
        if marker[1] == 0xFF:  # padding
            start += 1
            continue
        end = start + 2 + int.from_bytes(content[start + 2 : start + 4])
        if not (0xC0 <= marker[1] < 0xD0 or 0xDB <= marker[1] < 0xFF) or not start + 4 <= end <= len(content):
            break
        yield marker[1], start, end
        start = end


def _makes_jpeg_pixels(marker: int, body: bytes) -> bool:
    """Of application segments libjpeg heeds JFIF's and Adobe's, where they are whole: they tell the colour model."""
    if marker == 0xE0:
        return body.startswith(b"JFIF\0") and len(body) >= 14
    if marker == 0xEE:
        return body.startswith(b"Adobe") and len(body) >= 12
    return not (0xE0 < marker < 0xF0 or marker == 0xFE)


def _joined(pieces: dict[int, bytes]) -> bytes:
    """A profile from its segments by number, counted from 1; byte 13 of each says how many there are."""
    if not pieces or next(iter(pieces.values()))[13] != len(pieces):
        return b""
    return b"".join(pieces[number][14:] for number in sorted(pieces))


def _take_png_apart(content: bytes) -> ImageFile:
    kept, exif, profile = [content[:8]], b"", b""
    end = 8
    for kind, start, end in _png_chunks(content):
        body = content[start + 8 : end - 4]
        if kind[:1].isupper() or kind == b"tRNS":  # critical, or pixels too; what an animation adds is left out
            kept.append(content[start:end])
        elif kind == b"eXIf":
            exif = body
        elif kind == b"iCCP":
            profile = _unpacked(body.partition(b"\0")[2])
        elif kind in (b"tEXt", b"zTXt") and body.startswith(_RAW_EXIF):
            text = body[len(_RAW_EXIF) :]
            exif = exif or _unhexed(text if kind == b"tEXt" else _unpacked(text))
    kept.append(content[end:])
    return ImageFile(b"".join(kept), exif, profile)


def _png_chunks(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of each chunk, as far as they are whole."""
    start = 8
    while (kind := content[start + 4 : start + 8]).isalpha():
        end = start + 12 + int.from_bytes(content[start : start + 4])
        if end > len(content):
            break
        yield kind, start, end
        start = end


def _unpacked(block: bytes) -> bytes:
    """A compressed block behind its method byte; empty where it is damaged or larger than any profile."""
    unpacker = zlib.decompressobj()
    try:
        unpacked = unpacker.decompress(block[1:], _LARGEST_BLOCK)
    except zlib.error:
        return b""
    return b"" if unpacker.unconsumed_tail else unpacked


def _unhexed(text: bytes) -> bytes:
    """ImageMagick's form: an empty line, the kind, the length, then lines of hexadecimal digits."""
    try:
        return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))
    except ValueError:
        return b""
