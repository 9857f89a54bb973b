"""What a step has come to, on its way from the device to whoever wants to know."""

from typing import NamedTuple

import torch
from torch import Tensor

from lowvram_db.train.objective import Loss


class Numbers(NamedTuple):
    """A step's losses, and what its optimizer says of gradients that were not finite (Adam8.check_skipped)."""

    total: float
    instance: float
    prior: float
    skipped: list[int]


class Outcome:
    """The numbers of one step. They begin their way at once and are waited for where they are read: a step later they
    have long been there, while asking in between would let the device run out of work."""

    def __init__(self, loss: Loss, skipped: Tensor | None) -> None:
        """skipped: int32 [n], on the loss's device; float32 holds such numbers as they are."""
        numbers = torch.stack([part.detach().float() for part in loss])
        numbers = numbers if skipped is None else torch.cat([numbers, skipped.float()])
        self._arrived: torch.cuda.Event | None = None
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, pin_memory=True).copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._numbers = numbers

    def read(self) -> Numbers:
        if self._arrived is not None:
            self._arrived.synchronize()
        total, instance, prior, *skipped = self._numbers.tolist()
        return Numbers(total, instance, prior, [int(number) for number in skipped])
