"""The pictures that models are judged by: drawn once, kept by all that they follow from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from lowvram_db.atomic import replacing_file
from lowvram_db.errors import UserError
from lowvram_db.families import draw
from lowvram_db.families.base import NO_PROMPT, Family
from lowvram_db.families.conditioning import collated
from lowvram_db.families.text import encoded
from lowvram_db.memory.device import picture_dtypes, release_memory
from lowvram_db.progress import Bar

_VERSION = 1  # and another one whenever the same settings draw other pictures


class Wanted(NamedTuple):
    """One picture."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class How:
    """The settings that a picture follows from, beside its model."""

    guidance: float
    steps: int
    resolution: int  # pixels a side
    compute: str


@dataclass(frozen=True)
class Candidate:
    """A model that draws."""

    step: int
    path: str  # in the run's folder
    digest: str  # of all that it draws with
    family: Family
    photos: list[str] | None = None  # digests of those that it was trained on, where that is known

    def pictures(self, wanted: Sequence[Wanted], how: How, folder: Path, device: torch.device, bar: Bar) -> None:
        """Draw into the folder what is not there yet. No network of it is alive afterwards.

        Raises UserError where the model draws no pictures.
        """
        missing: dict[str, list[int]] = {}
        for prompt, seed in wanted:
            if not self.picture(Wanted(prompt, seed), how, folder).exists():
                missing.setdefault(prompt, []).append(seed)
        bar.advance(len(wanted) - sum(map(len, missing.values())))
        if not missing:
            return
        dtype, _ = picture_dtypes(how.compute, device)
        told = dict(encoded(self.family, [*missing, NO_PROMPT], device, dtype))
        drawer = draw.drawer_for(self.family, how.compute, device, max(map(len, missing.values())))
        for prompt, seeds in missing.items():
            conditioning = collated([told[prompt], told[NO_PROMPT]])
            across = [draw.Wanted(seed, how.guidance) for seed in seeds]
            drawn = drawer.draw(conditioning, across, steps=how.steps, resolution=how.resolution)
            for seed, picture in zip(seeds, drawn, strict=True):
                with replacing_file(self.picture(Wanted(prompt, seed), how, folder)) as temporary:
                    picture.save(temporary, format="PNG")
                bar.advance()
        del drawer
        release_memory()

    def picture(self, wanted: Wanted, how: How, folder: Path) -> Path:
        """Where a picture stands."""
        follows_from = [_VERSION, self.digest, wanted.prompt, wanted.seed, *how.__dict__.values()]
        return folder / f"{hashlib.sha256(json.dumps(follows_from).encode()).hexdigest()}.png"


def load(pictures: Sequence[Path]) -> list[Image.Image]:
    """Raises UserError, naming it, where one of them was deleted or damaged in the meantime."""
    found = []
    for path in pictures:
        try:
            with Image.open(path) as opened:
                found.append(opened.convert("RGB"))
        except OSError as error:
            raise UserError(f"{path}: cannot be read any more ({error}); delete it and evaluate again") from error
    return found
