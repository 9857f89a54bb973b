"""What a step waits for copies where state is streamed, by its trace's arithmetic and the rates of a card: of the one
that is here, or of one that is assumed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from typing import NamedTuple

import torch
from torch import nn

from lowvram_db.memory.stream.rates import measured
from lowvram_db.memory.stream.schedule import planned
from lowvram_db.memory.stream.timeline import Timing, simulated
from lowvram_db.train.streaming import Moving

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


_SHARE = 0.6  # of a card's dense rate is what a model of a 4070's step comes to (bench/streaming.py)
ASSUMED = Rates(_SHARE * 58.3e12, 24e9, 24e9, "assumed: an RTX 4070 on PCIe 4.0 x16")


def rates(budget: int | None) -> Rates:
    """Of the card that is here, if there is one and it is large enough to be the one that is meant."""
    if not torch.cuda.is_available() or torch.cuda.mem_get_info()[1] < (budget or 0):
        return ASSUMED
    device = torch.device("cuda", torch.cuda.current_device())
    return Rates(_operations(device), *measured(device, pinned=True), "measured here")


def waiting(what: Moving, done: Sequence[int], given: Rates) -> float:
    """Seconds by which a step that moves this is longer than one that moves nothing. done: floating point operations of
    the step at each of its events. The optimizer's own time, in which copies hide too, is left out."""
    times = timings(what, [operations / given.operations for operations in done], lambda p: 0.0, given)
    visits = planned(list(chain.from_iterable(what.uses)), what.sizes, what.room)
    ends = simulated(visits, times, _STEPS)
    return ends[-1] - ends[-2] - sum(time.before + time.own for time in times)


def timings(what: Moving, at: Sequence[float], stepping: Callable[[nn.Parameter], float], given: Rates) -> list[Timing]:
    """Of each use. at: when each event comes where nothing moves, seconds from the step's beginning. stepping: seconds
    that the optimizer takes. What is computed between a layer's reading and the next event waits for the weight, what
    comes before a gradient does not wait for the state."""
    times, waits = [], [is_read for _, is_read in what.events]
    between = [now - before for before, now in pairwise([0.0, *at, at[-1]])]
    for number, ((p, is_read), uses) in enumerate(zip(what.events, what.uses, strict=True)):
        for place, use in enumerate(uses):
            copied = BEGIN + what.sizes[use.parcel] / given.up, BEGIN + what.sizes[use.parcel] / given.down
            before = 0.0 if place or (number and waits[number - 1]) else between[number]
            own = between[number + 1] if is_read else stepping(p) if place == len(uses) - 1 else 0.0
            times.append(Timing(before, own, *copied))
    return times


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
