"""How fast RAM and card copy to each other: measured, on a card that is here."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_SIZE = 64 * 2**20  # bytes of a copy
_TIMES = 5


class CopyRates(NamedTuple):
    """Bytes a second."""

    up: float
    down: float


def measured(device: torch.device, pinned: bool) -> CopyRates:
    """One direction after the other, the best of a few copies each. Takes some 100 ms and 64 MiB of both."""
    there = torch.empty(_SIZE, dtype=torch.uint8, device=device)
    here = torch.zeros(_SIZE, dtype=torch.uint8, pin_memory=pinned)
    return CopyRates(_rate(there, here), _rate(here, there))


def _rate(destination: Tensor, source: Tensor) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    taken = []
    for _ in range(_TIMES):
        begin.record()
        destination.copy_(source, non_blocking=True)
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1000)
    return _SIZE / min(taken)
