"""Which photo, under which prompt, stands in which row of which step: a function of (seed, step) alone."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lowvram_db.cache.precompute import Cached
from lowvram_db.concept import Concept
from lowvram_db.concept.masks import load_mask, loss_weights
from lowvram_db.concept.prompts import DRAWS
from lowvram_db.families.base import NO_PROMPT, Moments
from lowvram_db.framing import Size, View
from lowvram_db.kernels import bits
from lowvram_db.train.objective import Stream


class Batch(NamedTuple):
    """Instance rows first, then as many prior rows where there is a prior."""

    moments: Moments  # float32 [B, C, h, w]
    views: list[View]
    prompts: list[str]
    instances: int  # how many rows show the subject
    masks: Tensor | None = None  # float32 [B, 1, h, w], what each latent counts in the loss; None: all of them alike


class _Row(NamedTuple):
    """Of a batch."""

    key: str
    view: View
    prompt: str
    photo: Path | None = None  # of the subject


@dataclass(frozen=True)
class Batches:
    """Every step's batch, by its number."""

    concept: Concept
    cached: Cached
    size: int
    seed: int
    hold_out: int = 0  # photos of the subject that stand in no batch

    @property
    def content(self) -> dict[str, list[str]]:
        """The pictures that are trained on, by digests of their pixels, wherever they lie and whatever their names."""
        return {
            "photos": sorted(self.cached.photos[photo].digest for photo in self.concept.instance_photos),
            "class images": sorted(self.cached.class_photos[photo].digest for photo in self.concept.class_photos),
            "captions": sorted(self._captions),
            "masks": sorted(
                f"{self.cached.photos[photo].digest} {hashlib.sha256(mask.read_bytes()).hexdigest()}"
                for photo, mask in self.concept.masks.items()
            ),
        }

    def __getitem__(self, step: int) -> Batch:
        size, visit = self._bucket(step)
        rows = [self._instance(step, row, size, visit) for row in range(self.size)]
        if self.concept.class_photos:
            rows += [self._prior(step, row, size) for row in range(self.size)]
        moments = self.cached.moments([row.key for row in rows])
        return Batch(
            moments,
            [row.view for row in rows],
            [row.prompt for row in rows],
            self.size,
            self._masks(rows, moments.mean) if self.concept.masks else None,
        )

    def _masks(self, rows: list[_Row], latents: Tensor) -> Tensor:
        """Of the rows of latents [B, C, h, w]; ones where a picture has none."""
        masks = torch.ones(len(rows), 1, *latents.shape[2:])
        for row, mask in zip(rows, masks, strict=True):
            if row.photo is not None and row.photo in self.concept.masks:
                mask[0] = self._mask(row.photo, row.view, (latents.shape[3], latents.shape[2]))
        return masks

    def _mask(self, photo: Path, view: View, latents: Size) -> Tensor:
        """float32 [h, w]; read once, and kept for as long as the batches are."""
        if (photo, view) not in self._read_masks:
            name = self.concept.masks[photo]
            weights = loss_weights(load_mask(name), view, latents, self.concept.mask_weight, name)
            self._read_masks[photo, view] = weights
        return self._read_masks[photo, view]

    @cached_property
    def _read_masks(self) -> dict[tuple[Path, View], Tensor]:
        return {}

    @property
    def _captions(self) -> Iterator[str]:
        """What is said of a picture beside it, with the picture's digest."""
        for photo, captions in self.concept.captions.items():
            yield from (f"{self.cached.photos[photo].digest} {caption}" for caption in captions)
        for photo, prompt in self.concept.class_prompts.items():
            yield f"{self.cached.class_photos[photo].digest} {prompt}"

    @property
    def trained_photos(self) -> list[Path]:
        """The subject's, in an order that stays when files are renamed."""
        return self._instance_photos[self.hold_out :]

    @property
    def held_out_photos(self) -> list[Path]:
        return self._instance_photos[: self.hold_out]

    @cached_property
    def _instance_photos(self) -> list[Path]:
        return sorted(self.concept.instance_photos, key=lambda photo: self.cached.photos[photo].digest)

    @cached_property
    def _buckets(self) -> dict[Size, list[Path]]:
        """The subject's photos by size, as all rows of a step have one."""
        buckets: dict[Size, list[Path]] = {}
        for photo in self.trained_photos:
            buckets.setdefault(self.cached.photos[photo].size, []).append(photo)
        return buckets

    def _bucket(self, step: int) -> tuple[Size, int]:
        """A step's size, and how many steps before it had the same.

        In a round of as many steps as there are photos each size has as many as photos of its own, in an order that
        changes from round to round: so every photo is shown equally often.
        """
        photos = self.trained_photos
        round_, place = divmod(step, len(photos))
        if len(self._buckets) == 1:
            return next(iter(self._buckets)), step
        order = [self.cached.photos[photos[p]].size for p in _order(len(photos), self.seed, round_, Stream.BUCKET)]
        size = order[place]
        return size, round_ * len(self._buckets[size]) + order[:place].count(size)

    def _instance(self, step: int, row: int, size: Size, visit: int) -> _Row:
        path = self._pick(self._buckets[size], visit * self.size + row, Stream.INSTANCE_ORDER)
        photo = self.cached.photos[path]
        variant = self._draw(len(photo.keys), step, row, Stream.VARIANT)
        return _Row(photo.keys[variant], photo.views[variant], self._prompt(path, step, row), path)

    def _prompt(self, photo: Path, step: int, row: int) -> str:
        dropout = self.concept.caption_dropout
        if dropout and self._draw(DRAWS, step, row, Stream.DROPOUT) < dropout * DRAWS:
            return NO_PROMPT
        choice = self.concept.choices[photo]
        return choice.at(self._draw(DRAWS if len(choice.weights) > 1 else 1, step, row, Stream.PROMPT))

    def _prior(self, step: int, row: int, size: Size) -> _Row:
        path = self._pick(self.concept.class_photos, step * self.size + row, Stream.CLASS_ORDER)
        photo = self.cached.class_photos[path]
        prompt = self.concept.class_prompts.get(path, self.concept.class_prompt)
        return _Row(photo.keys[size], photo.views[size], prompt)

    def _pick(self, photos: list[Path], number: int, stream: Stream) -> Path:
        """The photo of the row with this number; each epoch shows every photo once, in an order of its own."""
        epoch, place = divmod(number, len(photos))
        return photos[_order(len(photos), self.seed, epoch, stream)[place]]

    def _draw(self, choices: int, step: int, row: int, stream: Stream) -> int:
        return 0 if choices == 1 else bits.integer(choices, self.seed, step=step, sample=row, stream=stream)


@lru_cache(maxsize=16)
def _order(length: int, seed: int, epoch: int, stream: Stream) -> list[int]:
    """As bits.permutation; every row of an epoch asks for the same one."""
    return bits.permutation(length, seed, step=epoch, stream=stream)
