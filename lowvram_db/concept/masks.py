"""Masks: what of a photo is the subject, so that the loss may ask less of the rest.

`photo.mask.png` beside `photo.jpg`, white where the subject is, upright as the photo is seen, of its size or of its
shape.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lowvram_db.errors import UserError
from lowvram_db.framing import Size, View
from lowvram_db.photos import BLACK, load_photo

_SHAPE = 0.01  # how much longer or wider than the photo's a mask's shape may be: sizes are whole pixels


def load_mask(mask: Path) -> Image.Image:
    """8 bits a pixel, 255 where the subject is, 0 where nothing was painted. Raises UserError for one that cannot be
    read, or that is all black."""
    read = load_photo(mask, BLACK).convert("L")
    if read.getextrema()[1] == 0:
        raise UserError(f"{mask}: is black everywhere; white is the subject: paint it, or delete the mask")
    return read


def loss_weights(mask: Image.Image, view: View, latents: Size, rest: float, name: Path) -> Tensor:
    """What each latent of a view counts in the loss: float32 [h, w], 1 on average.

    latents: width and height. rest: of what is not the subject, beside 1. name: of the mask. Raises UserError where the
    mask is of another shape than the photo, and where nothing would count.
    """
    (width, height), (photo_width, photo_height) = mask.size, view.photo
    if abs(width * photo_height / (height * photo_width) - 1) > _SHAPE:
        raise UserError(
            f"{name}: is {width} x {height}, its photo {photo_width} x {photo_height}; make it of the photo's shape"
        )
    x, y = width / photo_width, height / photo_height
    left, top, right, bottom = view.box
    box = (left * x, top * y, min(right * x, width), min(bottom * y, height))
    seen = mask.resize(latents, Image.Resampling.BOX, box=box)
    if view.mirrored:
        seen = seen.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    white = torch.from_numpy(np.array(seen)).float() / 255
    weights = rest + (1 - rest) * white
    if not weights.any():
        raise UserError(f"{name}: shows no subject where the photo is cut; set train.mask_weight above zero")
    return weights / weights.mean()
