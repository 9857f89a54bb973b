"""Against ICC profiles written by hand, and what their colours are in sRGB by the formulas."""

import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from lowvram_db.colour import to_srgb
from lowvram_db.photos import load_photo

# Colorants of sRGB and of Adobe RGB (1998), adapted to D50: rows X, Y, Z; columns red, green, blue.
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
ADOBE_RGB = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
D50 = np.array([0.9642, 1.0, 0.8249])


def _fixed(*values):
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def _profile(kind, space, connection, tags):
    tags = [
        (b"desc", b"desc\0\0\0\0" + struct.pack(">I", 5) + b"hand\0" + b"\0" * 78),
        (b"cprt", b"text\0\0\0\0none\0"),
        (b"wtpt", b"XYZ \0\0\0\0" + _fixed(*D50)),
        *tags,
    ]
    table, data, start = b"", b"", 132 + 12 * len(tags)
    for tag, body in tags:
        body += b"\0" * (-len(body) % 4)
        table += tag + struct.pack(">II", start + len(data), len(body))
        data += body
    head = struct.pack(">I", start + len(data)) + b"none" + struct.pack(">I", 0x02100000) + kind + space + connection
    head += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 24 + _fixed(*D50)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


def _curve(*values):
    return b"curv\0\0\0\0" + struct.pack(f">I{len(values)}H", len(values), *values)


def rgb_profile(colorants, curve):
    """A display's. colorants: (3, 3); curve: one gamma as 8.8 fixed point, or a table of 16-bit values."""
    names = [(b"rXYZ", b"rTRC"), (b"gXYZ", b"gTRC"), (b"bXYZ", b"bTRC")]
    columns = [(xyz, b"XYZ \0\0\0\0" + _fixed(*colorants[:, index])) for index, (xyz, _) in enumerate(names)]
    return _profile(b"mntr", b"RGB ", b"XYZ ", columns + [(trc, _curve(*curve)) for _, trc in names])


def grey_profile(gamma):
    return _profile(b"mntr", b"GRAY", b"XYZ ", [(b"kTRC", _curve(round(gamma * 256)))])


def cmyk_profile(corners):
    """A press's that prints (16, 3) sRGB colours, of 255, where each ink is off or on: cyan slowest, black fastest."""
    lab = to_lab(corners)
    nodes = np.rint(np.stack([lab[:, 0] * 2.55, lab[:, 1] + 128, lab[:, 2] + 128], 1)).astype(np.uint8)
    same = bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    return _profile(b"prtr", b"CMYK", b"Lab ", [(b"A2B0", lut + same * 4 + nodes.tobytes() + same * 3)])


def srgb_decoded(values):
    """IEC 61966-2-1: values of 255 -> linear."""
    values = np.asarray(values) / 255.0
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def srgb_encoded(linear):
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


def in_srgb(pixels, colorants, gamma):
    """What (..., 3) pixels of a display with these colorants are in sRGB, both of 255."""
    return srgb_encoded((np.asarray(pixels) / 255.0) ** gamma @ colorants.T @ np.linalg.inv(SRGB).T)


def to_lab(pixels):
    """CIE 1976 L*a*b* under D50 of (..., 3) sRGB colours of 255."""
    t = srgb_decoded(pixels) @ SRGB.T / D50
    f = np.where(t > 216 / 24389, np.cbrt(t), (24389 / 27 * t + 16) / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


PIXELS = np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)
WIDE = rgb_profile(ADOBE_RGB, [round(2.2 * 256)])
SRGB_PROFILES = {
    "lcms": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    "1,024 entries, as HP's": rgb_profile(SRGB, np.rint(srgb_decoded(np.linspace(0, 255, 1024)) * 65535).astype(int)),
    "26 entries, as the tiny ones": rgb_profile(
        SRGB, np.rint(srgb_decoded(np.linspace(0, 255, 26)) * 65535).astype(int)
    ),
}
# What each mixture of inks looks like, unlike real ones; but bare paper is white, and all of them are black.
INKS = np.array([(255, 255, 255), *np.random.default_rng(1).integers(60, 200, (14, 3)), (0, 0, 0)])


def furthest(image, expected):
    return np.abs(np.asarray(image).astype(float) - expected).max()


@pytest.mark.parametrize(("suffix", "options"), [("png", {}), ("tif", {}), ("tif", {"compression": "tiff_lzw"}),
    ("webp", {"lossless": True}), ("jpg", {"quality": 100, "subsampling": 0})])  # fmt: skip
def test_a_profile_is_heeded_in_every_format(tmp_path, suffix, options):
    path = tmp_path / f"wide.{suffix}"
    flat = Image.new("RGB", (32, 32), (60, 160, 70))
    flat.save(path, icc_profile=WIDE, **options)
    photo = load_photo(path)
    assert furthest(photo, in_srgb((60, 160, 70), ADOBE_RGB, 2.2)) <= 3
    assert "icc_profile" not in photo.info  # or it would be applied once more where the photo is saved


@pytest.mark.parametrize("mode", ["RGB", "RGBX", "RGBA", "P"])
def test_rgb_of_every_mode_is_converted(mode):
    image = Image.fromarray(PIXELS)
    alpha = PIXELS[..., 0]
    if mode == "P":
        image = image.quantize(64)
        image.info["transparency"] = bytes(range(64))
        alpha = np.asarray(image)
    elif mode == "RGBA":
        image.putalpha(Image.fromarray(alpha))
    stored = np.asarray(image.convert("RGBA"))[..., :3]
    converted = np.asarray(to_srgb(image.convert(mode) if mode == "RGBX" else image, WIDE))
    assert furthest(converted[..., :3], in_srgb(stored, ADOBE_RGB, 2.2)) <= 2
    if mode in ("RGBA", "P"):
        assert np.array_equal(converted[..., 3], alpha)


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_of_every_mode_is_converted(tmp_path, mode):
    ramp = np.arange(256, dtype=np.uint8)[None].repeat(4, 0)
    image = Image.fromarray(ramp.astype(np.uint16) * 257 if mode == "I;16" else ramp).convert(mode)
    image.save(tmp_path / "grey.png", icc_profile=grey_profile(1.8))
    assert furthest(load_photo(tmp_path / "grey.png"), srgb_encoded((ramp / 255.0) ** 1.8)[..., None]) <= 2


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_inks_are_what_the_press_makes_of_them(tmp_path, suffix):
    inks = np.array([[255 * (node >> bit & 1) for bit in (3, 2, 1, 0)] for node in range(16)], np.uint8)
    image = Image.fromarray(inks[None].repeat(16, 1).repeat(16, 0), "CMYK")
    options = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
    image.save(tmp_path / f"inks.{suffix}", icc_profile=cmyk_profile(INKS), **options)
    assert furthest(np.asarray(load_photo(tmp_path / f"inks.{suffix}"))[8, 8::16], INKS) <= 5


@pytest.mark.parametrize("named", [False, True])
def test_lab_needs_no_profile(tmp_path, named):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes() if named else b""
    stored = np.rint(to_lab(INKS) * [2.55, 1, 1]).astype(int).astype(np.uint8)  # a and b in two's complement
    Image.fromarray(stored[None], "LAB").save(tmp_path / "lab.tif", icc_profile=profile)
    assert furthest(load_photo(tmp_path / "lab.tif"), INKS) <= 5


@pytest.mark.parametrize("name", SRGB_PROFILES)
def test_srgb_stays_bit_for_bit(name):
    image = Image.fromarray(PIXELS)
    assert to_srgb(image, SRGB_PROFILES[name]) is image


def test_a_profile_for_other_colours_is_passed_over():
    for mode, profile in [("RGB", grey_profile(1.0)), ("L", WIDE), ("CMYK", WIDE), ("RGB", cmyk_profile(INKS))]:
        image = Image.fromarray(PIXELS).convert(mode)
        assert to_srgb(image, profile) is image, mode


def test_a_broken_profile_is_passed_over():
    image = Image.fromarray(PIXELS)
    broken = [b"", b"nonsense", WIDE[:200], WIDE[:16] + b"\xff\xff\xff\xff" + WIDE[20:], WIDE.replace(b"rTRC", b"none")]
    for profile in broken:
        assert to_srgb(image, profile) is image
