"""Where parcels live, and the ways between there and the card.

Pinned RAM goes up and down directly. Where not all of it can be pinned (Windows pins half, containers may pin less),
the rest passes through rings of pinned stages, which a copy in RAM fills or drains beside the copies to the card.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from lowvram_db.memory.stream.lanes import Lanes, Wait, Why
from lowvram_db.memory.stream.schedule import whole_granules

STAGES = 2  # each way: one is filled while the other goes up


class Home(NamedTuple):
    memory: Tensor  # uint8 [bytes], on the CPU
    pinned: bool


class Ram:
    """Homes for parcels of `total` bytes together, of which `pinned` are one block of pinned memory, made once.

    total, pinned: bytes of homes, each in whole granules. Raises MemoryError where the block cannot be had.
    """

    def __init__(self, lanes: Lanes, total: int, pinned: int) -> None:
        self._lanes, self._total, self._pinned = lanes, total, min(total, pinned)
        self._block = lanes.home(self._pinned, pinned=True)
        self._seen = self._used = 0  # bytes of homes so far, and of those that are pinned
        self._up: _Ring | None = None
        self._down: _Ring | None = None

    @property
    def left(self) -> int:
        """Bytes of homes that there is room for."""
        return self._total - self._seen

    def home(self, size: int) -> Home:
        """The next one, of `size` bytes. Pinned and other ones alternate, so that staged copies are spread over a
        step."""
        rounded = whole_granules(size)
        self._seen += rounded
        if self._seen > self._total:
            raise MemoryError(f"homes for {self._seen} bytes where there was to be room for {self._total}")
        if (self._used + rounded) * self._total > self._seen * self._pinned:
            return Home(self._lanes.home(size, pinned=False), False)
        self._used += rounded
        return Home(self._block[self._used - rounded :][:size], True)

    def make_stages(self, homes: Sequence[Home]) -> None:
        """As these homes need them."""
        largest = max((home.memory.nbytes for home in homes if not home.pinned), default=0)
        if largest:
            self._up, self._down = (_Ring(self._lanes, largest) for _ in range(2))

    def up(self, home: Home, place: Tensor, home_waits: list[Wait], place_waits: list[Wait]) -> Any:
        """Have a parcel brought; the event that it has arrived."""
        lanes = self._lanes
        if home.pinned:
            return lanes.copy("up", place, home.memory, home_waits + place_waits)
        assert self._up is not None
        stage, stage_waits = self._up.next(home.memory.nbytes)
        filled = lanes.copy("fill", stage, home.memory, home_waits + stage_waits)
        sent = lanes.copy("up", place, stage, [*place_waits, Wait(Why.FILLED, filled)])
        self._up.used(Wait(Why.SENT, sent))
        return sent

    def down(self, place: Tensor, home: Home, waits: list[Wait]) -> tuple[Any, Any]:
        """Have a parcel carried down; the events that it has left its place, and that it is at home."""
        lanes = self._lanes
        if home.pinned:
            left = lanes.copy("down", home.memory, place, waits)
            return left, left
        assert self._down is not None
        stage, stage_waits = self._down.next(home.memory.nbytes)
        left = lanes.copy("down", stage, place, waits + stage_waits)
        drained = lanes.copy("drain", home.memory, stage, [Wait(Why.LANDED, left)])
        self._down.used(Wait(Why.DRAINED, drained))
        return left, drained


class _Ring:
    """Stages that are used in turn."""

    def __init__(self, lanes: Lanes, size: int) -> None:
        self._stages = [lanes.stage(size) for _ in range(STAGES)]
        self._waits: list[list[Wait]] = [[] for _ in range(STAGES)]  # until each may be written anew
        self._turn = 0

    def next(self, size: int) -> tuple[Tensor, list[Wait]]:
        return self._stages[self._turn][:size], self._waits[self._turn]

    def used(self, until: Wait) -> None:
        self._waits[self._turn] = [until]
        self._turn = (self._turn + 1) % STAGES
