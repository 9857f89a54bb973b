"""Pictures from a diffusers pipeline, seen to be pictures: networks that give no numbers draw black without a word."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from lowvram_db.errors import UserError


def draw(pipeline: Any, **inputs: Any) -> list[Image.Image]:
    """What a text-to-image pipeline draws of its inputs. Raises UserError where pixels are no numbers, or all the same,
    which no model draws that works."""
    pixels = pipeline(**inputs, output_type="np").images
    if not np.isfinite(pixels).all():
        raise UserError(f"the model's pictures are no numbers (NaN); {_mend(pipeline)}")
    images = pipeline.image_processor.numpy_to_pil(pixels)
    if any(_is_plain(image) for image in images):
        raise UserError(f"the model draws nothing but a single colour; {_mend(pipeline)}")
    return images


def _is_plain(image: Image.Image) -> bool:
    values = np.asarray(image)
    return bool((values == values[0, 0]).all())


def _mend(pipeline: Any) -> str:
    finer = "" if pipeline.dtype == torch.float32 else ", or draw it in fp32, which does not overflow"
    return f"take another copy of it, its weights may be damaged{finer}"
