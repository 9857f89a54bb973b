"""What a step waits for copies where state is streamed, by its trace's arithmetic and the rates of a card: of the one
that is here, or of one that is assumed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from lowvram_db.memory.stream.rates import measured
from lowvram_db.memory.stream.schedule import Use, planned
from lowvram_db.memory.stream.timeline import Timing, simulated
from lowvram_db.train.streaming import room_for

BEGIN = 10e-6  # seconds that a copy takes to begin
_STEPS = 3  # simulated; the last of them counts
_SIDE = 4096  # of the matrices by which a card's arithmetic is measured


class Rates(NamedTuple):
    """What a card does in a second."""

    operations: float  # floating point, of a training step in half precision
    up: float  # bytes that are copied to it
    down: float  # and from it, at the same time
    source: str

    def __str__(self) -> str:
        copies = f"{self.up / 1e9:.0f} GB/s up and {self.down / 1e9:.0f} GB/s down"
        return f"copies of {copies} beside {self.operations / 1e12:.0f} TFLOP/s ({self.source})"


class Passage(NamedTuple):
    """State of one tensor that goes up and comes down again."""

    size: int  # bytes
    flops: int  # done in the step when its gradient is there


_SHARE = 0.6  # of a card's dense rate is what a model of a 4070's step comes to (bench/streaming.py)
ASSUMED = Rates(_SHARE * 58.3e12, 24e9, 24e9, "assumed: an RTX 4070 on PCIe 4.0 x16")


def rates(budget: int | None) -> Rates:
    """Of the card that is here, if there is one and it is large enough to be the one that is meant."""
    if not torch.cuda.is_available() or torch.cuda.mem_get_info()[1] < (budget or 0):
        return ASSUMED
    device = torch.device("cuda", torch.cuda.current_device())
    return Rates(_operations(device), *measured(device, pinned=True), "measured here")


def waiting(passages: Sequence[Passage], eighths: int, given: Rates) -> float:
    """Seconds by which a step with these passages, of so many eighths of the state, is longer than one without. The
    optimizer's own time, in which copies hide too, is left out."""
    sizes = [passage.size for passage in passages]
    uses = [Use(parcel, changes=True) for parcel in range(len(sizes))]
    done = [0, *(passage.flops for passage in passages)]
    times = [
        Timing((now - before) / given.operations, 0.0, BEGIN + size / given.up, BEGIN + size / given.down)
        for size, (before, now) in zip(sizes, pairwise(done), strict=True)
    ]
    ends = simulated(planned(uses, sizes, room_for(sizes, eighths)), times, _STEPS)
    return ends[-1] - ends[-2] - sum(time.before for time in times)


def _operations(device: torch.device) -> float:
    """The same share of what a large product of matrices reaches as of an assumed card's data sheet."""
    matrix = torch.ones(_SIDE, _SIDE, device=device, dtype=torch.float16)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    taken = []
    for _ in range(3):
        begin.record()
        matrix @ matrix
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1000)
    return _SHARE * 2 * _SIDE**3 / min(taken)
