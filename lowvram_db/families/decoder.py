"""The VAE that turns latents into pictures: on the device only while it does so, one picture after the other.

Half precision can overflow inside a VAE (SDXL's is known for it). What comes out is not finite then, and that picture
and all that follow are decoded with float32 weights; where one does not fit it goes through in tiles.
"""

from typing import Any

import torch
from torch import Tensor

from lowvram_db.families.base import Family
from lowvram_db.families.tiles import tile
from lowvram_db.memory.device import lay_out
from lowvram_db.memory.out_of_memory import is_out_of_memory
from lowvram_db.progress import say


class Decoder:
    """One VAE, in main memory between two calls."""

    def __init__(self, family: Family, device: torch.device, dtype: torch.dtype):
        self._family, self._device = family, device
        self._vae: Any = family.load_vae(dtype)
        self._tilings = 0  # see tile()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor | None:
        """Finite latents [B, C, h, w] -> pixels float32 [B, 3, H, W] on the CPU, not finite where float32 overflows,
        too. None where not even one picture fits beside what else is on the device."""
        pictures: list[Tensor] = []
        while len(pictures) < len(latents):
            picture = self._try(latents[len(pictures) : len(pictures) + 1])
            if picture is None:
                return None
            if picture.isfinite().all() or self._vae.dtype == torch.float32:
                pictures.append(picture)
                continue
            name = str(self._vae.dtype).removeprefix("torch.")
            say(f"the VAE overflows in {name}: pictures are decoded in float32 from here on")
            self._vae = self._family.load_vae(torch.float32)
            for _ in range(self._tilings):
                tile(self._vae)
        return torch.cat(pictures)

    def tile(self) -> bool:
        """Decode in tiles from now on, or in smaller ones; whether there are such."""
        are_new = tile(self._vae)
        if are_new:
            self._tilings += 1
            say(f"pictures: out of memory; decoded in tiles of {self._vae.tile_sample_min_size} px from here on")
        return are_new

    def _try(self, latents: Tensor) -> Tensor | None:
        """None where the memory is full: whoever tries again must not do it inside `except`, which keeps it full."""
        try:
            lay_out(self._vae.to(self._device), self._device)
            return self._family.decode_latents(self._vae, latents).cpu()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return None
        finally:
            self._vae.to("cpu")
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
