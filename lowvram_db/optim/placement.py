"""Where weights and an optimizer's state live, and how a step gets at them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lowvram_db.kernels import adam8
from lowvram_db.memory import layers
from lowvram_db.memory.stream.schedule import whole_granules
from lowvram_db.optim.storage import Weights

State = dict[str, Any]

_RAM = torch.device("meta")  # as a Trace takes it


class Placement(Protocol):
    """What Adam8 asks for the weight and the state of a large tensor."""

    stays: bool  # whether what is kept is what is lent, and may be used at any time

    def keep(self, p: nn.Parameter, state: State) -> State:
        """The state of a parameter, new or of another placement that has ended, with its tensors where they will live;
        the weight goes there too."""

    def kept(self, p: nn.Parameter) -> Tensor:
        """The weight where it lives: good while at rest, and when all has ended."""

    def lent(self, p: nn.Parameter, state: State) -> AbstractContextManager[tuple[Tensor, State]]:
        """The weight, and the kept state beside it, for a step of it."""

    def at_rest(self) -> AbstractContextManager[None]:
        """While others read and write what is kept. May be entered again inside."""

    def end(self) -> None:
        """There is no further step; what is kept is as the last one left it. leave() or replace() follows for each."""

    def leave(self, p: nn.Parameter) -> None:
        """Let the weight live where it is used, so that another placement can take it."""

    def replace(self, p: nn.Parameter, value: Tensor) -> None:
        """Let the weight be this for good: what is kept, or more exact."""


class Resident:
    """All of it lives where it is used."""

    stays = True

    def keep(self, p: nn.Parameter, state: State) -> State:
        return {**state, **{name: tensor.to(p.device) for name, tensor in _tensors(state).items()}}

    def kept(self, p: nn.Parameter) -> Tensor:
        return p.detach()

    def lent(self, p: nn.Parameter, state: State) -> AbstractContextManager[tuple[Tensor, State]]:
        return nullcontext((p, state))

    def at_rest(self) -> AbstractContextManager[None]:
        return nullcontext()

    def end(self) -> None:
        pass

    def leave(self, p: nn.Parameter) -> None:
        pass

    def replace(self, p: nn.Parameter, value: Tensor) -> None:
        p.data = value


class Imagined(Resident):
    """What Streamed takes of the card and of RAM, where there are no values and nobody reads any."""

    stays = False

    def __init__(self, states: Collection[nn.Parameter], room: Tensor, lent: Mapping[nn.Parameter, nn.Module]) -> None:
        self._states, self._room, self._layers = states, room, lent
        self._homes: dict[nn.Parameter, Tensor] = {}

    def keep(self, p: nn.Parameter, state: State) -> State:
        if p in self._layers:
            self._homes[p] = torch.empty_like(p, device=_RAM)
            p.data = layers.shown(self._room, p)
            layers.lend(self._layers[p], self)
        device = _RAM if p in self._states else p.device
        kept = {name: torch.empty_like(tensor, device=device) for name, tensor in _tensors(state).items()}
        return {**state, **kept}

    def kept(self, p: nn.Parameter) -> Tensor:
        return self._homes[p] if p in self._layers else super().kept(p)

    @contextmanager
    def weight_of(self, p: nn.Parameter, learning: bool) -> Iterator[Tensor]:
        yield layers.shown(self._room, p)

    def end(self) -> None:
        for layer in self._layers.values():
            layers.lend(layer, None)

    def leave(self, p: nn.Parameter) -> None:
        if p in self._layers:
            p.data = torch.empty_like(p)

    def replace(self, p: nn.Parameter, value: Tensor) -> None:
        if p not in self._layers:  # else it is in RAM, and there a parameter of the card cannot be without values
            super().replace(p, value)


@cache  # a network has few sizes of tensors many times over
def state_bytes(n: int, weights: Weights) -> int:
    """What the kept state of a parameter of n elements takes in RAM and on the card. Bytes."""
    state: State = adam8.zero_state(n, torch.device("meta"))
    if weights == "bf16+residual":
        state["residual"] = torch.empty(n, dtype=torch.int8, device="meta")
    return part_bytes(state)


def _tensors(state: State) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def part_bytes(state: State) -> int:
    """What its tensors take one behind the other."""
    return sum(whole_granules(tensor.nbytes) for tensor in _tensors(state).values())


def parts(memory: Tensor, like: State) -> dict[str, Tensor]:
    """Tensors as those of a state, one behind the other in memory: uint8 [part_bytes(like)]."""
    found, start = {}, 0
    for name, tensor in _tensors(like).items():
        found[name] = memory[start:][: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        start += whole_granules(tensor.nbytes)
    return found
