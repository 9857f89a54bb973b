"""What a model draws of a word alone, beside what it draws of no words from the same noise.

A word without a meaning leaves a picture as it would be without it; one that the model knows moves the picture towards
what it means. How varied the pictures of a word are tells less: of a noun they may differ more than those of no words
(bench/bare_words.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image

from lowvram_db.atomic import replacing_file
from lowvram_db.families import open_model
from lowvram_db.families.base import NO_PROMPT
from lowvram_db.memory.arithmetic import is_native
from lowvram_db.memory.device import DTYPES, pick_device
from lowvram_db.reading import AS_IT_IS, Reading
from lowvram_db.sampling import grid_of_model
from lowvram_db.sheet import draw_grid

_SEEDS = 4  # pictures of each word
_STEPS = 20
_GUIDANCE = 7.0
_SIDE = 16  # pixels of the pictures that are compared: what is where, not how fine


@dataclass(frozen=True)
class Drawn:
    """A word's pictures in numbers, as shares of how far pictures of no words lie from each other."""

    word: str
    moved: float  # how far each lies from the picture of no words that began with the same noise
    spread: float  # how far they lie from each other


def draw_words(model: str, words: Sequence[str], sheet: Path, reading: Reading = AS_IT_IS) -> list[Drawn]:
    """Draw every word alone with the whole model and write the pictures as a PNG; the least moved first, there too.

    Raises UserError as open_model does, and where the sheet cannot be written.
    """
    family, device = open_model(model, reading=reading), pick_device()
    grid = grid_of_model(
        family,
        [NO_PROMPT, *words],
        next(compute for compute in ("bf16", "fp16", "fp32") if is_native(DTYPES[compute], device)),
        device,
        at_once=_SEEDS,
        guidance=[_GUIDANCE],
        seeds=_SEEDS,
        steps=_STEPS,
        resolution=family.native_resolution,
    )
    plain, *rows = grid.rows
    told = sorted(zip(map(compared, words, rows, [plain] * len(rows)), rows, strict=True), key=lambda one: one[0].moved)
    labels = ["no words", *(f"{drawn.word}: {drawn.moved:.2f}" for drawn, _ in told)]
    with replacing_file(sheet) as temporary:
        pictures = draw_grid([plain, *(row for _, row in told)], labels, [f"seed {seed}" for seed in range(_SEEDS)])
        pictures.save(temporary, format="PNG")
    return [drawn for drawn, _ in told]


def compared(word: str, pictures: Sequence[Image.Image], plain: Sequence[Image.Image]) -> Drawn:
    """Pictures of a word beside those of no words, each from the noise of the one in its place."""
    small, without = _small(pictures), _small(plain)
    apart = max(_apart(without), 1e-12)
    moved = np.mean([_distance(*pair) for pair in zip(small, without, strict=True)])
    return Drawn(word, float(moved / apart), _apart(small) / apart)


def _small(pictures: Sequence[Image.Image]) -> list[np.ndarray]:
    side = (_SIDE, _SIDE)
    return [np.asarray(picture.resize(side, Image.Resampling.BOX), dtype=np.float64) for picture in pictures]


def _apart(pictures: Sequence[np.ndarray]) -> float:
    return float(np.mean([_distance(*pair) for pair in combinations(pictures, 2)]))


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.sqrt(np.mean((one - other) ** 2)))
