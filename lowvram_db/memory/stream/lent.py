"""A network that is only read, its weights in RAM: each is on the device while its layer computes, and a while before.

    lent = Lent(network, device)
    network(x)  # as if it were all there, to the bit
    lent.end()

Its first pass finds out in which order weights are asked for; from the second on they come before that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowvram_db.memory import layers
from lowvram_db.memory.stream.engine import Stream
from lowvram_db.memory.stream.pinning import Growing, Pinning
from lowvram_db.memory.stream.ram import Home, Ram
from lowvram_db.memory.stream.reading import Rounds
from lowvram_db.memory.stream.schedule import whole_granules

SMALLEST = 4096  # elements: a copy takes 10 us to begin, in which 200 KiB go; no layer of a true UNet has less
ROOM = 256 * 2**20  # bytes of the card that all passes through, at the most where no weight is half as large


def lendable(network: nn.Module) -> list[Any]:
    """Its layers whose weights can live elsewhere, and are worth the way."""
    able: list[Any] = [layer for layer in network.modules() if layers.can_ask(layer)]
    return [layer for layer in able if layer.weight.numel() >= SMALLEST]


def weights_of(lent: Sequence[Any]) -> list[nn.Parameter]:
    """Each once, which layers may share."""
    return list(dict.fromkeys(layer.weight for layer in lent))


def room_for(sizes: Sequence[int]) -> int:
    """Bytes of the card that weights of so many bytes pass through: one comes while another is used."""
    return max(2 * max(map(whole_granules, sizes), default=0), min(ROOM, sum(sizes) // 4))


class Lent:
    """A lender of the network's weights to its layers.

    network: on the CPU, in its precision and as the device's kernels read it; everything but these weights moves to the
        device. Beside its use such a parameter shows whatever is in the room.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self._layers = lendable(network)
        weights, pinning = weights_of(self._layers), Pinning(device)
        sizes = [p.nbytes for p in weights]
        ram, self._lanes = Growing(pinning, sum(map(whole_granules, sizes))), pinning.lanes
        self._homes = {p: _housed(p, ram) for p in weights}
        self._numbers = {p: number for number, p in enumerate(weights)}
        room = self._lanes.room(room_for(sizes))
        self._stream = Stream([], list(self._homes.values()), ram, self._lanes, room)
        self._rounds = Rounds(self._stream, sizes, room.nbytes)
        for p in weights:
            p.data = layers.shown(room, p)
        network.to(device)
        for layer in self._layers:
            layers.lend(layer, self)

    @contextmanager
    def weight_of(self, p: nn.Parameter, learning: bool) -> Iterator[Tensor]:
        assert not learning, "nobody takes a gradient down"
        number = self._numbers[p]
        place = self._rounds.take(number)
        try:
            yield layers.shown(place, p)
        finally:
            self._stream.give_back(number, changed=False)

    def end(self) -> None:
        """The layers have their weights again, in RAM; all else stays where it is."""
        self._stream.settle()
        for layer in self._layers:
            layers.lend(layer, None)
        for p, home in self._homes.items():
            p.data = layers.shown(home.memory, p)
        self._lanes.close()


def _housed(p: nn.Parameter, ram: Ram) -> Home:
    """A home for a weight, which is there then and nowhere else."""
    home = ram.home(p.nbytes)
    p.data = layers.shown(home.memory, p).copy_(p.detach())
    return home
