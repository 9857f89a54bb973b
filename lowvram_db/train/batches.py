"""Which photo, under which prompt, stands in which row of which step: a function of (seed, step) alone."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

from lowvram_db.cache.framing import Size, View
from lowvram_db.cache.precompute import Cached
from lowvram_db.concept import Concept
from lowvram_db.families.base import Moments
from lowvram_db.kernels import bits
from lowvram_db.train.objective import Stream


class Batch(NamedTuple):
    """Instance rows first, then as many prior rows where there is a prior."""

    moments: Moments  # float32 [B, C, h, w]
    views: list[View]
    prompts: list[str]
    instances: int  # how many rows show the subject


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
        }

    def __getitem__(self, step: int) -> Batch:
        size, visit = self._bucket(step)
        rows = [self._instance(step, row, size, visit) for row in range(self.size)]
        if self.concept.class_photos:
            rows += [self._prior(step, row, size) for row in range(self.size)]
        return Batch(
            moments=self.cached.moments([key for key, *_ in rows]),
            views=[view for _, view, _ in rows],
            prompts=[prompt for *_, prompt in rows],
            instances=self.size,
        )

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

    def _instance(self, step: int, row: int, size: Size, visit: int) -> tuple[str, View, str]:
        """Key, view and prompt of one row of the subject."""
        photo = self.cached.photos[self._pick(self._buckets[size], visit * self.size + row, Stream.INSTANCE_ORDER)]
        variant, prompts = self._draw(len(photo.keys), step, row, Stream.VARIANT), self.concept.instance_prompts
        prompt = prompts[self._draw(len(prompts), step, row, Stream.PROMPT)]
        return photo.keys[variant], photo.views[variant], prompt

    def _prior(self, step: int, row: int, size: Size) -> tuple[str, View, str]:
        photo = self.cached.class_photos[
            self._pick(self.concept.class_photos, step * self.size + row, Stream.CLASS_ORDER)
        ]
        return photo.keys[size], photo.views[size], self.concept.class_prompt

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
