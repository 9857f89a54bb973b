"""Pictures of a model in two stages, denoising and decoding, seen to be pictures: networks that give no numbers draw
black without a word.

The big networks need not be on the device together: text encoders have gone before a denoiser comes, and where the VAE
does not fit beside the denoiser, that makes way for it. Where not even the denoiser fits, its weights come from RAM.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lowvram_db.errors import UserError
from lowvram_db.families.base import Family
from lowvram_db.families.conditioning import Conditioning, brought
from lowvram_db.families.decoder import Decoder
from lowvram_db.families.guidance import Scales
from lowvram_db.memory.device import picture_dtypes, release_memory
from lowvram_db.memory.only_read import OnlyRead
from lowvram_db.memory.out_of_memory import is_out_of_memory
from lowvram_db.progress import say


class Wanted(NamedTuple):
    """A picture to draw."""

    seed: int  # the same starting noise on every device
    guidance: float


def drawer_for(
    family: Family,
    compute: str,
    device: torch.device,
    at_once: int,
    begins: Callable[[str], None] = lambda stage: None,
    streamed: bool = False,
) -> "Drawer":
    """For a model on disk, in the precision of pictures. streamed: whether it is known that the denoiser's weights have
    to come from RAM."""
    dtype, wider = picture_dtypes(compute, device)
    own = OnlyRead(family.load_denoiser(lambda weight: weight.to(dtype)), device, "pictures", streamed)
    return Drawer(family, own.network, device, dtype, at_once, own=own, wider=wider, begins=begins)


class Drawer:
    """Draws several pictures at once: fewer, from then on, where the memory does not suffice, which is said."""

    def __init__(
        self,
        family: Family,
        denoiser: Any,
        device: torch.device,
        dtype: torch.dtype,
        at_once: int,
        *,
        decoding: torch.dtype | None = None,
        own: OnlyRead | None = None,
        wider: torch.dtype | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        begins: Callable[[str], None] = lambda stage: None,
    ) -> None:
        """denoiser: on the device, taking `dtype`. decoding: the VAE's dtype; default: the same. own: where nobody else
        uses the denoiser: it may leave the device for the VAE then, and have its weights in RAM. wider: the precision
        that such a one in fp16 goes over to, for good, where it overflows. autocast: around the denoiser. begins: is
        told of every "denoising" and "decoding"."""
        self._family, self._denoiser, self._device, self._dtype = family, denoiser, device, dtype
        self._most = self._at_once = at_once
        self._own, self._wider, self._autocast = own, wider, autocast
        self._begins, self._pipeline = begins, family.sampler(denoiser)
        self._decoder = Decoder(family, device, decoding or dtype)

    def draw(
        self, conditioning: Conditioning, pictures: list[Wanted], *, steps: int, resolution: int
    ) -> Iterator[Image.Image]:
        """The pictures, in their order. conditioning: the text part of a prompt and of NO_PROMPT. Raises UserError
        where pixels are no numbers, or all the same, which no model draws that works."""
        inputs = {
            "num_inference_steps": steps,
            "height": resolution,
            "width": resolution,
            "output_type": "latent",
        }
        left = pictures
        while left:
            self._begins("denoising")
            latents = self._latents(conditioning, left[: self._at_once], inputs)
            if latents is None:
                self._take_less(min(self._at_once, len(left)))
                continue
            self._begins("decoding")
            yield from [self._picture(pixels) for pixels in self._decoded(latents)]
            left = left[len(latents) :]

    def _take_less(self, together: int) -> None:
        """Memory does not suffice for so many pictures together."""
        if together > 1:
            self._at_once = together // 2
            say(f"pictures: out of memory; {self._at_once} at once from here on")
            release_memory()
        elif self._own is not None:
            self._own.stream()
            self._at_once = self._most  # now there is room, and the more share the copies the better

    def _latents(self, conditioning: Conditioning, pictures: list[Wanted], inputs: dict[str, Any]) -> Tensor | None:
        """Finite ones, [len(pictures), C, h, w]; None where memory does not suffice for so many."""
        latents = self._try(conditioning, pictures, inputs)
        if latents is None or latents.isfinite().all():
            return latents
        if self._own is not None and self._wider is not None and self._dtype == torch.float16:
            name = str(self._wider).removeprefix("torch.")
            say(f"the model overflows in fp16: its pictures are drawn in {name} from here on")
            self._dtype = self._wider
            self._own.convert(self._wider)
            return self._latents(conditioning, pictures, inputs)
        raise UserError(f"the model's pictures are no numbers (NaN); {self._mend()}")

    def _try(self, conditioning: Conditioning, pictures: list[Wanted], inputs: dict[str, Any]) -> Tensor | None:
        """None where memory does not suffice for so many, and less can be taken: whoever tries again must not do it
        inside `except`, which keeps it full."""
        generators = [torch.Generator().manual_seed(picture.seed) for picture in pictures]  # on the CPU
        rows = {
            "num_images_per_prompt": len(pictures),
            "generator": generators,
            "guidance_scale": Scales([picture.guidance for picture in pictures]),
        }
        told = self._family.sampling_inputs(brought(conditioning, self._device, self._dtype))
        try:
            with self._autocast():
                return self._pipeline(**told, **inputs, **rows).images
        except Exception as error:
            is_least = len(pictures) == 1 and (self._own is None or self._own.is_streamed)
            if is_least or not is_out_of_memory(error):
                raise
            return None

    def _decoded(self, latents: Tensor) -> Tensor:
        """Pixels, float32 [B, 3, H, W] on the CPU; the denoiser is on the device again afterwards."""
        pixels = self._decoder.decode(latents)
        if pixels is not None:
            return pixels
        if self._own is not None and not self._own.is_streamed:
            self._own.leave()
            pixels = self._decoder.decode(latents)
        while pixels is None:
            if not self._decoder.tile():
                raise torch.OutOfMemoryError("no picture can be decoded, not even in tiles")
            pixels = self._decoder.decode(latents)
        if self._own is not None:
            self._own.come()
        return pixels

    def _picture(self, pixels: Tensor) -> Image.Image:
        """Of [3, H, W] in [-1, 1]."""
        if not pixels.isfinite().all():
            raise UserError(f"the model's pictures are no numbers (NaN); {self._mend()}")
        values = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        if (values == values[0, 0]).all():
            raise UserError(f"the model draws nothing but a single colour; {self._mend()}")
        return Image.fromarray(np.ascontiguousarray(values))

    def _mend(self) -> str:
        finer = "" if self._dtype == torch.float32 else ", or draw it in fp32, which does not overflow"
        return f"take another copy of it, its weights may be damaged{finer}"
