"""Lanes on a CPU, in made-up time: every order in which a GPU may do what it was asked for, and a witness of each race.

What a copy or a computation takes is made up, at random where a test wants that; what happens, happens in the order of
that time, and the same again for the same durations. Threads that sleep would meet a race by chance, and not twice.

- The host is as far ahead as a computation: what follows one is asked for when that begins. So a computation gets a
  copy of its place to work on, and what it makes of that reaches the place when its time is over.
- While a copy goes on its destination is full of canaries, and so is a place or stage that has been left.
- Whoever reads, reads from beginning to end: another value there at the end is a race. So is a canary that is lent, and
  a copy to where there is still something else.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lowvram_db.memory.stream.lanes import Lane, Wait

CANARY = 0xFF  # a byte; two of them are no number in bf16, and four none in float32


class Race(AssertionError):
    """Something was read or written at the wrong time."""


class Done(NamedTuple):
    """A line of the timeline."""

    lane: str  # or "compute"
    size: int  # bytes
    start: float
    end: float


class MadeUpTime:
    """duration(lane, bytes): what each copy, and each "compute", takes, in the order in which they are asked for.

    now: made-up time. timeline: what was done last, in the order in which it was asked for. card_bytes: what would be
    on the card.
    """

    def __init__(self, duration: Callable[[str, int], float]) -> None:
        self._duration = duration
        self.now = 0.0
        self.timeline: deque[Done] = deque(maxlen=2**16)  # a run has no end of them
        self.card_bytes = 0
        self._idle: dict[str, float] = {}  # by lane: since when
        self._to_come: list[tuple[float, int, Callable[[], None]]] = []
        self._asked = 0  # how many things have been put into that
        self._passages: set[int] = set()  # storages where parcels do not live
        self._read: dict[int, Tensor] = {}  # what was lent, by what was lent

    def room(self, size: int) -> Tensor:
        self.card_bytes += size
        return self._passage(size)

    def home(self, size: int, pinned: bool) -> Tensor:
        return torch.zeros(size, dtype=torch.uint8)

    def stage(self, size: int) -> Tensor:
        return self._passage(size)

    def copy(self, lane: Lane, destination: Tensor, source: Tensor, waits: Sequence[Wait]) -> float:
        start, end = self._book(lane, source.nbytes, max(self.now, self._end_of(waits)))
        read: list[Tensor] = []

        def begin() -> None:
            if self._is_passage(destination) and not _canaries(destination):
                raise Race(f"{lane}: a place is written that is not free")
            read.append(source.clone())
            destination.fill_(CANARY)

        def finish() -> None:
            if not torch.equal(source, read[0]):
                raise Race(f"{lane}: the source has changed meanwhile")
            if not _canaries(destination):
                raise Race(f"{lane}: another has written there meanwhile")
            destination.copy_(source)
            if self._is_passage(source):
                source.fill_(CANARY)

        self._at(start, begin)
        self._at(end, finish)
        return end

    def lend(self, place: Tensor, waits: Sequence[Wait]) -> Tensor:
        self._pass_until(max(self._idle.get("compute", 0.0), self._end_of(waits)))
        if _canaries(place):
            raise Race("a canary was lent")
        lent = place.clone()
        self._read[id(lent)] = place.clone()
        return lent

    def take_back(self, place: Tensor, lent: Tensor, changed: bool) -> float:
        read, made = self._read.pop(id(lent)), lent.clone()
        if not changed and not torch.equal(made, read):
            raise Race("what was only to be read has been changed")

        def finish() -> None:
            if not torch.equal(place, read):
                raise Race("compute: the place has changed meanwhile")
            if changed:
                place.copy_(made)
            else:
                place.fill_(CANARY)

        end = self._book("compute", place.nbytes, self.now)[1]
        self._at(end, finish)
        return end

    def work(self) -> None:
        """Let the computation do something else: a "compute" of no bytes."""
        self._book("compute", 0, self.now)

    def drop(self, place: Tensor, arrived: Wait) -> float:
        end = self._end_of([arrived])

        def finish() -> None:
            place.fill_(CANARY)

        self._at(end, finish)
        return end

    def settle(self, waits: Sequence[Wait]) -> None:
        self._pass_until(self._end_of(waits))

    def close(self) -> None:
        self._pass_until(max(self._idle.values(), default=0.0))

    def _end_of(self, waits: Sequence[Wait]) -> float:
        return max((wait.event for wait in waits), default=0.0)

    def _book(self, lane: str, size: int, earliest: float) -> tuple[float, float]:
        """The next that a lane does: its begin and end."""
        start = max(earliest, self._idle.get(lane, 0.0))
        end = self._idle[lane] = start + self._duration(lane, size)
        self.timeline.append(Done(lane, size, start, end))
        return start, end

    def _at(self, time: float, happens: Callable[[], None]) -> None:
        # At the same time in the order asked for: nobody waits for what is asked for later.
        heapq.heappush(self._to_come, (time, self._asked, happens))
        self._asked += 1

    def _pass_until(self, time: float) -> None:
        self.now = max(self.now, time)
        while self._to_come and self._to_come[0][0] <= self.now:
            heapq.heappop(self._to_come)[2]()

    def _passage(self, size: int) -> Tensor:
        memory = torch.full((size,), CANARY, dtype=torch.uint8)
        self._passages.add(memory.untyped_storage().data_ptr())
        return memory

    def _is_passage(self, memory: Tensor) -> bool:
        return memory.untyped_storage().data_ptr() in self._passages


def _canaries(memory: Tensor) -> bool:
    return bool((memory == CANARY).all())
