"""The VAE under small memory: loaded when it is first needed, in batches that fit, in tiles where one photo does not.

Half precision can overflow inside a VAE (SDXL's is known for it). What comes out is not finite then; whoever asked has
to take those photos to the float32 weights.
"""

from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lowvram_db.families.base import Family, Moments
from lowvram_db.families.tiles import are_least, tile
from lowvram_db.framing import to_float
from lowvram_db.memory.device import free_bytes, lay_out, peak_bytes, release_memory, reset_peak
from lowvram_db.memory.out_of_memory import is_out_of_memory
from lowvram_db.progress import say

_SHARE = 0.8  # of the free memory that a batch may take: other processes want some, and so do kernels' workspaces
_LARGEST_BATCH = 32  # beyond which a GPU gets no faster


class ImageEncoder:
    """One VAE on one device. A context manager, after which no weight of it is left."""

    def __init__(self, family: Family, device: torch.device, dtype: torch.dtype):
        """Loads nothing yet."""
        self.tiled = 0  # times that tiles have been asked for, for what is encoded from now on
        self._family, self._device, self._dtype = family, device, dtype
        self._vae: Any = None
        self._measures = device.type == "cuda"  # whether the first image of a size tells how many fit
        self._batches: dict[torch.Size, int] = {}

    def __enter__(self) -> "ImageEncoder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unload()

    def batch(self, pixels: Tensor) -> int:
        """How many images like this one, uint8 [3, H, W], to encode at once.

        On a CPU one: more at once are not faster there, and what comes out would depend on the company in its last
        bits. On a GPU what fits, by the memory that the first one took.
        """
        return self._batches.get(pixels.shape, 1)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Moments:
        """uint8 [B, 3, H, W] -> float32 moments [B, C, h, w] on the CPU; NaN or infinite where the dtype overflowed.

        Raises what is_out_of_memory tells where not even one image fits, in tiles.
        """
        if self._vae is None:
            self._vae = self._family.load_vae(self._dtype).to(self._device)
            lay_out(self._vae, self._device)
            for _ in range(self.tiled):
                tile(self._vae)
        at_once = len(pixels)
        while (parts := self._try(pixels, at_once)) is None:
            release_memory()
            if at_once > 1:
                at_once //= 2
                self._batches[pixels.shape[1:]] = at_once
            else:
                tile(self._vae)
                self.tiled += 1
                say(f"photos: out of memory; encoded in tiles of {self._vae.tile_sample_min_size} px from here on")
        return Moments(torch.cat([part.mean for part in parts]), torch.cat([part.logvar for part in parts]))

    def _try(self, pixels: Tensor, at_once: int) -> list[Moments] | None:
        """None where the memory is full: whoever tries again must not do it inside `except`, which keeps it full."""
        try:
            return [self._run(part) for part in pixels.split(at_once)]
        except Exception as error:
            if not is_out_of_memory(error) or (at_once == 1 and are_least(self._vae)):
                raise
            return None

    def _run(self, pixels: Tensor) -> Moments:
        measuring = self._measures and pixels.shape[1:] not in self._batches
        if measuring:
            reset_peak(self._device)
            before, room = peak_bytes(self._device), free_bytes(self._device)
        mean, logvar = self._family.encode_images(self._vae, to_float(pixels.to(self._device)))
        if measuring:
            each = max(1, (peak_bytes(self._device) - before) // len(pixels))
            self._batches[pixels.shape[1:]] = min(_LARGEST_BATCH, max(1, int(_SHARE * room) // each))
        return Moments(mean.cpu(), logvar.cpu())

    def unload(self) -> None:
        """Let the VAE go; it is loaded again when it is needed."""
        if self._vae is not None:
            self._vae = None
            release_memory()
