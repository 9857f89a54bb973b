"""Colours as an embedded ICC profile means them -> sRGB, which is what the models were taught."""

import io

import numpy as np
from PIL import Image, ImageCms

# What two curves of sRGB differ by after rounding, of 255. Profiles that mean other colours differ by far more.
_ROUNDING = 2
_LEVELS = np.linspace(0, 255, 18).round().astype(np.uint8)
_PROBES = {  # every colour of a coarse grid, every grey
    "RGB": np.stack(np.meshgrid(_LEVELS, _LEVELS, _LEVELS), -1).reshape(18, -1, 3),
    "L": np.arange(256, dtype=np.uint8)[None],
}


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """An 8-bit image of any mode, as RGB in sRGB, or RGBA where it has transparency.

    The image itself where there is nothing to convert: without a profile, with one that means sRGB anyway, and with one
    that is broken or for colours of another kind, as viewers do.
    """
    if not profile:
        return image
    mode = _colour_mode(image)
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.ImageCmsTransform(source, _srgb(), mode, "RGB")
    except (OSError, ValueError):  # all that LittleCMS says of a profile that it cannot use for this mode
        return image
    if mode in _PROBES and _changes_nothing(transform, _PROBES[mode]):
        return image
    if not image.has_transparency_data:
        return transform.apply(image.convert(mode))
    clear = image.convert("RGBA")
    converted = transform.apply(clear.convert(mode) if mode == "RGB" else image.convert(mode))
    converted.putalpha(clear.getchannel("A"))
    return converted


def _colour_mode(image: Image.Image) -> str:
    """The mode of an image's colours without its alpha and palette."""
    if image.mode in ("CMYK", "LAB"):
        return image.mode
    return "L" if image.mode in ("1", "L", "LA", "La") else "RGB"


def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _changes_nothing(transform: ImageCms.ImageCmsTransform, probe: np.ndarray) -> bool:
    before = Image.fromarray(probe)
    difference = np.asarray(transform.apply(before)).astype(int) - np.asarray(before.convert("RGB"))
    return bool(np.abs(difference).max() <= _ROUNDING)
