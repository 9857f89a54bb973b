import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lowvram_db.image_file import orientation, take_apart

RAMP = Image.fromarray(np.arange(24 * 16 * 3, dtype=np.uint8).reshape(16, 24, 3))
FIELD_TYPES = st.integers(0, 14) | st.integers(0, 0xFFFF)
OTHER_FIELDS = st.lists(
    st.tuples(st.integers(0, 0xFFFF).filter(lambda tag: tag != 0x0112), FIELD_TYPES, st.binary(min_size=8, max_size=8))
)

SHORT = st.binary(max_size=40)
OTHER_SEGMENTS = st.lists(st.tuples(st.sampled_from([*range(0xFFE1, 0xFFEE), 0xFFEF, 0xFFFE]), SHORT), max_size=4)
OTHER_CHUNKS = st.lists(st.tuples(st.sampled_from([b"tEXt", b"zTXt", b"iTXt", b"pHYs", b"iCCP", b"acTL"]), SHORT))


def encoded(kind, **options):
    buffer = io.BytesIO()
    RAMP.save(buffer, kind, **options)
    return buffer.getvalue()


def tiff_block(order, fields):
    """fields: (tag, type, four bytes of count and four of value)."""
    header = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HLH", 42, 8, len(fields))
    return header + b"".join(struct.pack(f"{order}HH", tag, kind) + rest for tag, kind, rest in fields) + b"\0" * 4


def segment(marker, body):
    return struct.pack(">HH", marker, len(body) + 2) + body


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def pixels(content):
    with Image.open(io.BytesIO(content)) as opened:
        return np.asarray(opened)


@given(st.sampled_from("<>"), st.sampled_from(["BbHhLl"]).flatmap(st.sampled_from), st.integers(1, 8), OTHER_FIELDS,
       OTHER_FIELDS)  # fmt: skip
def test_orientation_is_read_whatever_the_other_fields_are(order, form, number, before, after):
    value = struct.pack(f"{order}L{form}", 1, number).ljust(8, b"\0")
    kind = {"B": 1, "H": 3, "L": 4, "b": 6, "h": 8, "l": 9}[form]
    block = tiff_block(order, [*before, (0x0112, kind, value), *after])
    assert orientation(block) == orientation(b"Exif\0\0" + block) == number


@given(st.binary(max_size=80) | st.builds(tiff_block, st.sampled_from("<>"), OTHER_FIELDS), st.integers(0, 80))
def test_what_says_no_orientation_is_upright(block, cut):
    assert orientation(block[:cut]) == 1


@pytest.mark.parametrize("number", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_upright(number):
    assert orientation(tiff_block("<", [(0x0112, 3, struct.pack("<LL", 1, number))])) == 1


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "MPO"])
def test_exif_and_profile_are_found_and_the_pixels_stay(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = np.random.default_rng(0).bytes(150_000)  # three segments of a JPEG
    more = {"save_all": True, "append_images": [RAMP.rotate(90)]} if kind == "MPO" else {}
    parts = take_apart(encoded(kind, exif=exif, icc_profile=profile, **more))
    assert orientation(parts.exif) == 6
    assert kind == "TIFF" or parts.profile == profile
    assert np.array_equal(pixels(parts.pixels), pixels(encoded(kind)))


@given(OTHER_SEGMENTS)
def test_a_jpegs_other_segments_go(segments):
    jpeg = encoded("JPEG")
    added = b"".join(segment(marker, body) for marker, body in segments)
    assert take_apart(jpeg[:2] + added + jpeg[2:]).pixels == jpeg


@given(OTHER_CHUNKS)
def test_a_pngs_other_chunks_go(chunks):
    png = encoded("PNG")
    added = b"".join(chunk(kind, body) for kind, body in chunks)
    assert take_apart(png[:33] + added + png[33:]).pixels == png


def test_a_png_tells_its_orientation_as_imagemagick_wrote_it():
    block = tiff_block("<", [(0x0112, 3, struct.pack("<LL", 1, 8))])
    text = f"\nexif\n{len(block):8}\n{block.hex()}\n".encode()
    png, key = encoded("PNG"), b"Raw profile type exif\0"
    for added in (chunk(b"tEXt", key + text), chunk(b"zTXt", key + b"\0" + zlib.compress(text))):
        assert orientation(take_apart(png[:33] + added + png[33:]).exif) == 8


@pytest.mark.parametrize("packed", [zlib.compress(bytes(40 << 20)), b"no zlib"], ids=["without end", "damaged"])
def test_a_profile_that_does_not_unpack_is_none(packed):
    png = encoded("PNG")
    assert take_apart(png[:33] + chunk(b"iCCP", b"name\0\0" + packed) + png[33:]) == (png, b"", b"")


@given(st.sampled_from(["PNG", "JPEG", "TIFF", "WEBP"]), st.data())
def test_any_bytes_are_taken(kind, data):
    content = bytearray(encoded(kind))
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=10)):
        content[place] = data.draw(st.integers(0, 255))
    take_apart(bytes(content[: data.draw(st.integers(0, len(content)))]))
