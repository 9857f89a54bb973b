"""Pictures from a diffusers pipeline, seen to be pictures: networks that give no numbers draw black without a word."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from lowvram_db.errors import UserError
from lowvram_db.families.base import Family
from lowvram_db.memory.device import lay_out, picture_dtypes, release_memory
from lowvram_db.memory.out_of_memory import is_out_of_memory
from lowvram_db.progress import say


def pipeline_for(family: Family, compute: str, device: torch.device) -> tuple[Any, torch.dtype | None]:
    """A model's pipeline on its device, in the precision of pictures; and the `wider` one for draw()."""
    dtype, wider = picture_dtypes(compute, device)
    pipeline = family.pipeline(dtype).to(device)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            lay_out(part, device)
    return pipeline, wider


class Drawer:
    """Draws several pictures at once: fewer, from then on, where the memory does not suffice, which is said."""

    def __init__(self, pipeline: Any, at_once: int, wider: torch.dtype | None = None) -> None:
        """wider: as for draw()."""
        self._pipeline, self._at_once, self._wider = pipeline, at_once, wider

    def draw(self, seeds: list[int], **inputs: Any) -> Iterator[Image.Image]:
        """A picture of the same inputs for every seed."""
        left = seeds
        while left:
            images = self._drawn(left[: self._at_once], inputs)
            if images is None:
                self._at_once = min(self._at_once, len(left)) // 2
                say(f"pictures: out of memory; {self._at_once} at once from here on")
                release_memory()
                continue
            yield from images
            left = left[len(images) :]

    def _drawn(self, seeds: list[int], inputs: dict[str, Any]) -> list[Image.Image] | None:
        """None where memory does not suffice for so many: whoever tries again must not do it inside `except`, which
        keeps it full."""
        try:
            return draw(self._pipeline, seeds, self._wider, **inputs)
        except Exception as error:
            if len(seeds) == 1 or not is_out_of_memory(error):
                raise
            return None


def draw(pipeline: Any, seeds: list[int], wider: torch.dtype | None = None, **inputs: Any) -> list[Image.Image]:
    """What a text-to-image pipeline draws of its inputs, for one prompt, a picture for every seed.

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
    return pipeline(**inputs, num_images_per_prompt=len(seeds), generator=generators, output_type="np").images


def _is_plain(image: Image.Image) -> bool:
    values = np.asarray(image)
    return bool((values == values[0, 0]).all())


def _mend(pipeline: Any) -> str:
    finer = "" if pipeline.dtype == torch.float32 else ", or draw it in fp32, which does not overflow"
    return f"take another copy of it, its weights may be damaged{finer}"
