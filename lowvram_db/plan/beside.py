"""Predict what takes memory beside training: encoding text and photos, and drawing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from typing import Any

import torch

from lowvram_db.config import Config
from lowvram_db.families.blank import Blank
from lowvram_db.families.conditioning import brought, collated
from lowvram_db.families.tiles import tile
from lowvram_db.memory.device import DTYPES
from lowvram_db.memory.stream.lent import lendable, room_for, weights_of
from lowvram_db.memory.stream.schedule import whole_granules
from lowvram_db.memory.trace import Trace
from lowvram_db.plan.inputs import CPU, latent_shape, phase, tensors, timesteps, view
from lowvram_db.plan.result import Phase
from lowvram_db.plan.tracing import tracing


def encoding(config: Config, family: Blank, limit: int | None = None) -> Iterator[Phase]:
    """Text encoding (one prompt at a time) and latent encoding (one photo at a time, in tiles where it has to be), both
    in float32."""
    with tracing() as trace, torch.no_grad():
        encoders = family.load_text_encoders()
        trace.label("weights", tensors(encoders.values()))
        family.encode_prompts(encoders, [""])
    yield phase("text encoding", trace)
    latents = in_tiles(lambda tilings: _latent_encoding(config, family, tilings), limit)
    yield replace(latents, least=True)  # cache/encoder.py makes batches of what is free


def _latent_encoding(config: Config, family: Blank, tilings: int) -> Phase | None:
    side = config.train.resolution
    with tracing() as trace, torch.no_grad():
        vae: Any = family.load_vae()
        trace.label("weights", tensors([vae]))
        if not all(tile(vae) for _ in range(tilings)):
            return None
        vae.encode(torch.empty(1, 3, side, side))
    return phase("latent encoding", trace)


def in_tiles(traced: Callable[[int], Phase | None], limit: int | None) -> Phase:
    """With a picture whole, else in the largest tiles that fit, else in the smallest. traced: with tiles asked for so
    often; None where they cannot be so small."""
    found = traced(0)
    assert found is not None
    for tilings in count(1):
        if limit is None or found.peak_bytes <= limit or (smaller := traced(tilings)) is None:
            break
        found = smaller
    return found


@contextmanager
def drawing(config: Config, family: Blank) -> Iterator["Drawing"]:
    """What it takes to draw with a model of which only the denoiser is on the card to begin with."""
    with tracing() as trace, torch.no_grad():
        yield Drawing(config, family, trace)


class Drawing:
    """The two stages of families/draw.py, in the precision that the config computes in, with the denoiser on the card
    or with its weights in RAM."""

    def __init__(self, config: Config, family: Blank, trace: Trace):
        self._config, self._family, self._trace = config, family, trace
        self._dtype = DTYPES[config.precision.compute]
        self._denoised: dict[int, Phase] = {}  # by rows, of which class images and a sample are mostly the same
        self._denoiser: Any = family.load_denoiser(lambda weight: weight.to(self._dtype))
        trace.label("weights", tensors([self._denoiser]))
        sizes = [p.nbytes for p in weights_of(lendable(self._denoiser))]
        self._lent, self._room = sum(map(whole_granules, sizes)), whole_granules(room_for(sizes))

    def denoising(self, what: str, pictures: int, guidance: float, streamed: bool = False) -> Phase:
        """So many pictures at once."""
        rows = guided(pictures, guidance)
        if rows not in self._denoised:
            start = self._trace.mark()
            denoise(self._config, self._family, self._denoiser, rows, self._dtype)
            self._denoised[rows] = phase("denoising", self._trace, start)
        one = replace(self._denoised[rows], name=f"{what}, denoising")
        return self._streamed(one) if streamed else one

    def decoding(self, what: str, limit: int | None, streamed: bool = False) -> Phase:
        """One picture at a time: beside the denoiser, or without it where that is over the limit, or then in tiles. One
        that is streamed stays."""

        def decoded(tilings: int) -> Phase | None:
            start = self._trace.mark()
            if not decode(self._config, self._family, self._trace, torch.float32, tilings):
                return None
            return phase(f"{what}, decoding", self._trace, start)

        whole = decoded(0)
        assert whole is not None
        if not streamed and (limit is None or whole.peak_bytes <= limit):
            return whole
        without = self._streamed if streamed else self._away
        return in_tiles(lambda tilings: (one := decoded(tilings) if tilings else whole) and without(one), limit)

    def _away(self, one: Phase) -> Phase:
        return one.with_more("weights", -sum(whole_granules(tensor.nbytes) for tensor in tensors([self._denoiser])))

    def _streamed(self, one: Phase) -> Phase:
        """What is in RAM then, and the room that it passes through, count alike at every moment."""
        return replace(one.with_more("weights", self._room - self._lent), ram_bytes=self._lent)


def guided(pictures: int, guidance: float) -> int:
    """Rows: with and without the prompt where there is guidance."""
    return pictures * (2 if guidance > 1 else 1)


def denoise(config: Config, family: Blank, denoiser: Any, rows: int, dtype: torch.dtype) -> None:
    """One step."""
    latents = torch.empty(latent_shape(config, family, rows), dtype=dtype)
    told = collated([family.view_conditioning(view(config))] * rows) | family.cached_text([""] * rows)
    family.denoise(denoiser, latents, timesteps(rows, 0), brought(told, CPU, dtype))


def decode(config: Config, family: Blank, trace: Trace, dtype: torch.dtype, tilings: int = 0) -> bool:
    """One picture, by a VAE that comes for it, whole or in tiles that are asked for so many times; whether there are
    such. dtype: float32 where half precision is given up for it, as one that overflows is."""
    vae: Any = family.load_vae(dtype)
    trace.label("weights", tensors([vae]))
    if not all(tile(vae) for _ in range(tilings)):
        return False
    vae.decode(torch.empty(latent_shape(config, family, 1), dtype=dtype))
    return True
