"""Which of weights and optimizer's state live in RAM under a strategy, and how they pass through the card."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor, nn

from lowvram_db.memory.stream.pinning import open_ram
from lowvram_db.memory.stream.schedule import Use, least_room, uses_of_a_step, whole_granules
from lowvram_db.optim.placement import Imagined, Placement, Resident, state_bytes
from lowvram_db.optim.storage import Weights
from lowvram_db.optim.streamed import Streamed
from lowvram_db.train.strategy import EIGHTHS, Strategy

ROOM = 320 * 2**20  # bytes of the card that all passes through at the most, unless one use needs more

Events = Sequence[tuple[nn.Parameter, bool]]  # see schedule.uses_of_a_step


@dataclass(frozen=True)
class Moving:
    """What a strategy moves."""

    strategy: Strategy
    events: Events  # of a step, those that have to do with it
    places: Sequence[int]  # of them among all there are
    states: Mapping[nn.Parameter, int]  # bytes of each
    weights: Mapping[nn.Parameter, nn.Module]  # with their layers

    @cached_property
    def sizes(self) -> list[int]:
        """Bytes of each parcel: of the states, then of the weights."""
        return [*self.states.values(), *(p.nbytes for p in self.weights)]

    @cached_property
    def uses(self) -> list[list[Use]]:
        """Of these parcels, by event."""
        states = {p: number for number, p in enumerate(self.states)}
        weights = {p: number for number, p in enumerate(self.weights, len(states))}
        return uses_of_a_step(self.events, weights, states)

    @property
    def ram_bytes(self) -> int:
        return sum(map(whole_granules, self.sizes))

    @property
    def carried(self) -> tuple[int, int]:
        """Bytes that a step has brought to the card, and back."""
        uses = list(chain.from_iterable(self.uses))
        return sum(self.sizes[use.parcel] for use in uses), sum(self.sizes[use.parcel] for use in uses if use.changes)

    @property
    def room(self) -> int:
        """Bytes of the card that all passes through."""
        return max(least_room(list(chain.from_iterable(self.uses)), self.sizes), min(ROOM, sum(self.sizes) // 4))


def moving(strategy: Strategy, events: Events, layers: Mapping[nn.Parameter, nn.Module], weights: Weights) -> Moving:
    """events: of larger tensors. layers: those whose weights can be elsewhere, by the weights."""
    states = _share([p for p, is_read in events if not is_read], strategy.streamed, weights)
    lent = _lent(layers, strategy.weights)
    places = [place for place, (p, is_read) in enumerate(events) if p in (lent if is_read else states)]
    return Moving(strategy, [events[place] for place in places], places, states, lent)


def placement(what: Moving, device: torch.device, imagined: Callable[[int], Tensor] | None) -> Placement:
    """imagined: gives so many bytes of the card, where tensors have no values. Raises DoesNotFit where the RAM is not
    free."""
    if not what.states:
        return Resident()
    if imagined:
        return Imagined(what.states, imagined(what.room), what.weights)
    return Streamed(what.events, what.room, *open_ram(what.ram_bytes, device), what.weights)


def _lent(layers: Mapping[nn.Parameter, nn.Module], eighths: int) -> dict[nn.Parameter, nn.Module]:
    """Those whose weights are streamed. The largest stay: they belong to the smallest pictures, and so have the least
    arithmetic to hide their copies behind."""
    left = sum(p.nbytes for p in layers) * (EIGHTHS - eighths)
    staying = set()
    for p in sorted(layers, key=lambda p: p.nbytes, reverse=True):
        if p.nbytes * EIGHTHS <= left:
            left -= p.nbytes * EIGHTHS
            staying.add(p)
    return {p: layer for p, layer in layers.items() if p not in staying}


def _share(order: Sequence[nn.Parameter], eighths: int, weights: Weights) -> dict[nn.Parameter, int]:
    """Those whose state is streamed, and its bytes: spread over backward, so that the copies are."""
    chosen: dict[nn.Parameter, int] = {}
    seen = taken = 0
    for p in order if eighths else ():
        size = state_bytes(p.numel(), weights)
        seen += size
        if (taken + size) * EIGHTHS <= seen * eighths:
            chosen[p] = size
            taken += size
    return chosen
