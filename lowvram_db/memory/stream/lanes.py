"""The means by which parcels move: what the engine asks of a device.

A lane does what it is asked for in that order, beside the other lanes and beside the computation; only a wait orders
anything else. "up" and "down" cross to the card and back. Where RAM is not pinned, "fill" and "drain" bring a parcel
into a pinned stage and out of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

Lane = Literal["fill", "up", "down", "drain"]


class Why(Enum):
    """All the waits there are."""

    ARRIVED = "a computation reads what has arrived"
    COMPUTED = "what is carried down has been computed"
    LEFT = "a place is written anew when what was there has gone down"
    READ = "a place is written anew when the computation that only read there is done"
    RETURNED = "what comes up again is back in RAM"
    FILLED = "what goes up from a stage has been put there"
    SENT = "a stage is filled anew when what was there has gone up"
    LANDED = "what is put from a stage into RAM has come down"
    DRAINED = "a stage takes what comes down when what was there is in RAM"
    AT_REST = "RAM is read and written by others when all copies are done"


class Wait(NamedTuple):
    why: Why
    event: Any  # as the lanes make them


class Lanes(Protocol):
    """Tensors are uint8 [bytes]."""

    def room(self, size: int) -> Tensor:
        """Memory on the card, for places of visits."""

    def home(self, size: int, pinned: bool) -> Tensor:
        """RAM, for good. Raises MemoryError where it cannot be had, or cannot be pinned."""

    def stage(self, size: int) -> Tensor:
        """Pinned RAM to pass through. Raises MemoryError."""

    def copy(self, lane: Lane, destination: Tensor, source: Tensor, waits: Sequence[Wait]) -> Any:
        """Have it copied, after `waits`; the event that it is done."""

    def lend(self, place: Tensor, waits: Sequence[Wait]) -> Tensor:
        """What the computation that is asked for from now on works on, after `waits`: the place, or what stands for
        it."""

    def take_back(self, place: Tensor, lent: Tensor, changed: bool) -> Any:
        """The event that the computation asked for since is done with the place."""

    def drop(self, place: Tensor, arrived: Wait) -> Any:
        """The event that nothing is done any more with a place that is not lent, after it has been written."""

    def settle(self, waits: Sequence[Wait]) -> None:
        """Return after `waits`."""

    def close(self) -> None:
        """After all copies, give back what is not given back by itself."""
