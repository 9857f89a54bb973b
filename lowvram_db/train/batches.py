"""Which photo, under which prompt, stands in which row of which step: a function of (seed, step) alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from lowvram_db.cache.precompute import Cached
from lowvram_db.concept import Concept
from lowvram_db.families.base import Moments
from lowvram_db.kernels import bits
from lowvram_db.train.objective import Stream


class Batch(NamedTuple):
    """Instance rows first, then as many prior rows where there is a prior."""

    moments: Moments  # float32 [B, C, h, w]
    prompts: list[str]
    instances: int  # how many rows show the subject


@dataclass(frozen=True)
class Batches:
    """Every step's batch, by its number."""

    concept: Concept
    cached: Cached
    size: int
    seed: int

    @property
    def identity(self) -> list[str]:
        """What is trained on, by content, in order; conditioning that is not cached is left out."""
        photos = [self.cached.latent_keys[photo] for photo in self.concept.photos]
        return photos + [key for prompt in self.concept.prompts if (key := self.cached.text_keys.get(prompt))]

    def __getitem__(self, step: int) -> Batch:
        rows = [self._instance(step, row) for row in range(self.size)]
        if self.concept.class_photos:
            rows += [self._prior(step, row) for row in range(self.size)]
        entries = [self.cached.moments[photo] for photo, _ in rows]
        return Batch(
            moments=Moments(
                torch.stack([entry.mean for entry in entries]), torch.stack([entry.logvar for entry in entries])
            ),
            prompts=[prompt for _, prompt in rows],
            instances=self.size,
        )

    def _instance(self, step: int, row: int) -> tuple[Path, str]:
        prompts = self.concept.instance_prompts
        which = bits.integer(len(prompts), self.seed, step=step, sample=row, stream=Stream.PROMPT)
        return self._pick(self.concept.instance_photos, step, row, Stream.INSTANCE_ORDER), prompts[which]

    def _prior(self, step: int, row: int) -> tuple[Path, str]:
        return self._pick(self.concept.class_photos, step, row, Stream.CLASS_ORDER), self.concept.class_prompt

    def _pick(self, photos: list[Path], step: int, row: int, stream: Stream) -> Path:
        """Each epoch shows every photo once, in an order of its own."""
        epoch, place = divmod(step * self.size + row, len(photos))
        return photos[bits.permutation(len(photos), self.seed, step=epoch, stream=stream)[place]]
