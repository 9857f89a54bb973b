"""Pictures from a diffusers pipeline, seen to be pictures: networks that give no numbers draw black without a word."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from lowvram_db.errors import UserError
from lowvram_db.progress import say


def draw(pipeline: Any, seeds: list[int], wider: torch.dtype | None = None, **inputs: Any) -> list[Image.Image]:
    """What a text-to-image pipeline draws of its inputs, a picture for every seed.

    wider: the precision that a pipeline in fp16 goes over to, for good, where it overflows; None where its weights are
    not its own. Raises UserError where pixels are no numbers, or all the same, which no model draws that works.
    """
    pixels = _pixels(pipeline, seeds, inputs)
    if wider is not None and pipeline.dtype == torch.float16 and not np.isfinite(pixels).all():
        say(f"the model overflows in fp16: its pictures are drawn in {str(wider).removeprefix('torch.')} from here on")
        pipeline.to(wider)
        pixels = _pixels(pipeline, seeds, inputs)
    if not np.isfinite(pixels).all():
        raise UserError(f"the model's pictures are no numbers (NaN); {_mend(pipeline)}")
    images = pipeline.image_processor.numpy_to_pil(pixels)
    if any(_is_plain(image) for image in images):
        raise UserError(f"the model draws nothing but a single colour; {_mend(pipeline)}")
    return images


def _pixels(pipeline: Any, seeds: list[int], inputs: dict[str, Any]) -> Any:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # on the CPU: the same noise on every device
    return pipeline(**inputs, generator=generators, output_type="np").images


def _is_plain(image: Image.Image) -> bool:
    values = np.asarray(image)
    return bool((values == values[0, 0]).all())


def _mend(pipeline: Any) -> str:
    finer = "" if pipeline.dtype == torch.float32 else ", or draw it in fp32, which does not overflow"
    return f"take another copy of it, its weights may be damaged{finer}"
