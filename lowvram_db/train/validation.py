"""The loss on fixed pictures while training goes on: what is memorised and what is forgotten, without drawing anything.

Of up to four photos of the subject and four class images, three views each, every one at a noise and a timestep of its
own, which follow from the picture alone: the same for every run and every machine. In metrics.jsonl a validation is a
line by itself, of the step after which it was made; step 0 is the base model:

    {"step": 0, "validation_subject": 1.0, "validation_subject_loss": 0.1312, "validation_class": 1.0, ...}

validation_subject, validation_held_out, validation_class: the mean loss as a ratio to step 0, of photos that are
trained on, of photos that `train.hold_out` keeps back, and of class images; each is there only where there are such
pictures, and once step 0 is known. NAME_loss: the mean loss itself. A subject that falls while held-out photos do not
is memorised; a class that rises is being forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lowvram_db.framing import View
from lowvram_db.kernels import bits
from lowvram_db.memory.device import sent
from lowvram_db.sections import TrainConfig
from lowvram_db.train.batches import Batch, Batches
from lowvram_db.train.objective import Stream
from lowvram_db.train.trainer import Trainer

_PICTURES = 4  # of the subject, and as many of the class
_HELD_OUT = 2  # of the subject's, at most
_DRAWS = 3  # of each
_SHARE = 0.03  # of a run's arithmetic
_PASSES = 3  # what a training step takes for each of its rows: a backward pass is worth two forward ones


class Picture(NamedTuple):
    """One picture under its prompt, as often as it is drawn for."""

    digest: str  # of its pixels
    keys: list[str]
    views: list[View]
    prompt: str


class Validation:
    """Measures a trainer's losses on its fixed pictures. Leaves the trainer as it was."""

    def __init__(self, trainer: Trainer, before: dict[str, float]):
        """before: what metrics.jsonl says of step 0, where training goes on."""
        self._trainer, self._before = trainer, before
        self._pictures = {kind: chosen for kind, chosen in _chosen(trainer.batches).items() if chosen}
        self._step_rows = trainer.config.train.batch * (2 if "class" in self._pictures else 1)
        rows = _DRAWS * sum(map(len, self._pictures.values()))
        self._every = interval(trainer.config.train, self._step_rows, rows)

    def due(self, step: int) -> bool:
        """Whether to measure after a step: the first and the last are always among them."""
        return self._every > 0 and (step % self._every == 0 or step == self._trainer.config.train.steps)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """The figures of this step, by the names above."""
        with self._evaluating():
            losses = {
                f"validation_{kind}": torch.cat([self._losses(picture) for picture in pictures]).mean().item()
                for kind, pictures in self._pictures.items()
            }
        measured = {f"{name}_loss": loss for name, loss in losses.items()}
        if self._trainer.step == 0:
            self._before = measured
        ratios = {name: loss / self._before[f"{name}_loss"] for name, loss in losses.items() if self._known(name)}
        return {**ratios, **measured}

    def _known(self, name: str) -> bool:
        before = self._before.get(f"{name}_loss")
        return isinstance(before, float) and before > 0

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Without dropout, which would take random numbers that are training's."""
        for network in self._trainer.modules.values():
            network.eval()
        try:
            yield
        finally:
            for network in self._trainer.modules.values():
                network.train()

    def _losses(self, picture: Picture) -> Tensor:
        """Of every draw, float32 [_DRAWS], in passes no larger than training's."""
        trainer = self._trainer
        batch = Batch(trainer.batches.cached.moments(picture.keys), picture.views, [picture.prompt] * _DRAWS, _DRAWS)
        seed = int(picture.digest[:15], 16)
        inputs = trainer.inputs(batch)._replace(
            timesteps=sent(_timesteps(len(trainer.table), seed), trainer.device),
            address=sent(torch.tensor([seed, 0]), trainer.device),
        )
        size = min(_DRAWS, self._step_rows // trainer.strategy.parts)
        parts = [slice(first, first + size) for first in range(0, _DRAWS, size)]
        return torch.cat([trainer.forward(inputs, batch.prompts, part)[1] for part in parts])


def interval(train: TrainConfig, step_rows: int, rows: int) -> int:
    """Steps from one validation of so many rows to the next, where a batch has step_rows; 0 where there is none, as in
    a run so short that its first and last alone would take more than their share."""
    if train.validate_every is not None:
        return train.validate_every
    passes = _PASSES * step_rows * train.accumulate * train.steps
    affordable = int(_SHARE * passes / rows) - 1  # beside that of step 0
    return math.ceil(train.steps / affordable) if affordable > 0 else 0


def _timesteps(count: int, seed: int) -> Tensor:
    """One from each third of the `count` there are, int64 [_DRAWS], on the CPU."""
    edges = [count * draw // _DRAWS for draw in range(_DRAWS + 1)]
    draws = [
        first + bits.integer(end - first, seed, step=0, sample=draw, stream=Stream.TIMESTEP)
        for draw, (first, end) in enumerate(pairwise(edges))
    ]
    return torch.tensor(draws)


def _chosen(batches: Batches) -> dict[str, list[Picture]]:
    """The pictures to measure, by kind: of each the first by their digests."""
    held_out = batches.held_out_photos[:_HELD_OUT]
    trained = batches.trained_photos[: _PICTURES - len(held_out)]
    frames = batches.cached.class_photos
    by_digest = sorted(batches.concept.class_photos, key=lambda photo: frames[photo].digest)
    return {
        "subject": [_photo(batches, photo) for photo in trained],
        "held_out": [_photo(batches, photo) for photo in held_out],
        "class": [_class_image(batches, photo) for photo in by_digest[:_PICTURES]],
    }


def _photo(batches: Batches, photo: Path) -> Picture:
    frame = batches.cached.photos[photo]
    places = [draw % len(frame.keys) for draw in range(_DRAWS)]
    keys, views = [frame.keys[place] for place in places], [frame.views[place] for place in places]
    return Picture(frame.digest, keys, views, next(iter(batches.concept.choices[photo].weights)))


def _class_image(batches: Batches, photo: Path) -> Picture:
    frame, concept = batches.cached.class_photos[photo], batches.concept
    size = min(frame.keys)
    prompt = concept.class_prompts.get(photo, concept.class_prompt)
    return Picture(frame.digest, [frame.keys[size]] * _DRAWS, [frame.views[size]] * _DRAWS, prompt)
