"""Where an optimizer's state lives, and how a step gets at it: beside the weights, or in RAM and through the card."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lowvram_db.kernels import adam8
from lowvram_db.memory.stream.engine import Stream
from lowvram_db.memory.stream.lanes import Lanes
from lowvram_db.memory.stream.ram import Home, Ram
from lowvram_db.memory.stream.schedule import GRANULE, Use, planned
from lowvram_db.optim.storage import Weights

State = dict[str, Any]

_RAM = torch.device("meta")  # as a Trace takes it


class Placement(Protocol):
    """What Adam8 asks for the state of a large tensor."""

    def keep(self, p: nn.Parameter, state: State) -> State:
        """The state of a parameter, new or of another placement that has ended, with its tensors where they will
        live."""

    def lent(self, p: nn.Parameter, state: State) -> AbstractContextManager[State]:
        """The kept state beside the weight, for a step of it."""

    def at_rest(self) -> AbstractContextManager[None]:
        """While others read and write kept tensors. May be entered again inside."""

    def end(self) -> None:
        """There is no further step; kept tensors are as the last one left them."""


class Resident:
    """State lives where it is used."""

    def keep(self, p: nn.Parameter, state: State) -> State:
        return {**state, **{name: tensor.to(p.device) for name, tensor in _tensors(state).items()}}

    def lent(self, p: nn.Parameter, state: State) -> AbstractContextManager[State]:
        return nullcontext(state)

    def at_rest(self) -> AbstractContextManager[None]:
        return nullcontext()

    def end(self) -> None:
        pass


class Streamed:
    """The state of some parameters lives in RAM and is on the card for their step alone.

    order: of these parameters' gradients in backward, see schedule.arrivals. One that comes out of turn is stepped
        right, and late: up to a round of copies goes before it.
    room: bytes on the card, at least for the largest state; twice that and more lets copies hide behind the
        computation.
    ram: with room for state_bytes() of each of them.
    """

    def __init__(self, order: Sequence[nn.Parameter], room: int, ram: Ram, lanes: Lanes) -> None:
        self._number = {p: number for number, p in enumerate(order)}
        self._room, self._ram, self._lanes = room, ram, lanes
        self._homes: dict[int, Home] = {}
        self._stream: Stream | None = None  # from when all homes are known to the end
        self._resting = False

    def keep(self, p: nn.Parameter, state: State) -> State:
        if p not in self._number:
            return Resident().keep(p, state)
        home = self._homes[self._number[p]] = self._ram.home(_size(state))
        kept = _parts(home.memory, state)
        for name, tensor in kept.items():
            tensor.copy_(state[name])
        if len(self._homes) == len(self._number):
            self._start()
        return {**state, **kept}

    @contextmanager
    def lent(self, p: nn.Parameter, state: State) -> Iterator[State]:
        number = self._number.get(p)
        if number is None:
            yield state
            return
        assert self._stream is not None
        place = self._stream.take(number)
        try:
            yield {**state, **_parts(place, state)}
        finally:
            self._stream.give_back(number)

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        if self._stream is None or self._resting:
            yield
            return
        self._resting = True
        try:
            with self._stream.at_rest():
                yield
        finally:
            self._resting = False

    def end(self) -> None:
        if self._stream:
            self._stream.settle()
            self._stream = None
        self._lanes.close()

    def _start(self) -> None:
        homes = [self._homes[number] for number in range(len(self._number))]
        uses = [Use(number, changes=True) for number in range(len(homes))]
        visits = planned(uses, [home.memory.nbytes for home in homes], self._room)
        self._stream = Stream(visits, homes, self._ram, self._lanes, self._room)


class Imagined(Resident):
    """What Streamed takes of the card and of RAM, for state without values, which nobody reads."""

    def __init__(self, streamed: Collection[nn.Parameter], room: Tensor) -> None:
        self._streamed, self._room = streamed, room

    def keep(self, p: nn.Parameter, state: State) -> State:
        device = _RAM if p in self._streamed else p.device
        kept = {name: torch.empty_like(tensor, device=device) for name, tensor in _tensors(state).items()}
        return {**state, **kept}


@cache  # a network has few sizes of tensors many times over
def state_bytes(n: int, weights: Weights) -> int:
    """What the kept state of a parameter of n elements takes in RAM and on the card. Bytes."""
    state: State = adam8.zero_state(n, torch.device("meta"))
    if weights == "bf16+residual":
        state["residual"] = torch.empty(n, dtype=torch.int8, device="meta")
    return _size(state)


def _tensors(state: State) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _size(state: State) -> int:
    return sum(-(-tensor.nbytes // GRANULE) * GRANULE for tensor in _tensors(state).values())


def _parts(memory: Tensor, like: State) -> dict[str, Tensor]:
    """Tensors as those of a state, one behind the other in memory: uint8 [_size(like)]."""
    parts, start = {}, 0
    for name, tensor in _tensors(like).items():
        parts[name] = memory[start:][: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        start += -(-tensor.nbytes // GRANULE) * GRANULE
    return parts
