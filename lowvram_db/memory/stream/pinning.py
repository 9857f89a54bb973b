"""RAM for what passes through a device, as much of it pinned as the system allows."""

from __future__ import annotations

import psutil
import torch

from lowvram_db.errors import DoesNotFit
from lowvram_db.memory.size import gib
from lowvram_db.memory.stream.cuda import Cuda
from lowvram_db.memory.stream.lanes import Lanes
from lowvram_db.memory.stream.made_up import MadeUpTime
from lowvram_db.memory.stream.ram import Home, Ram
from lowvram_db.memory.stream.schedule import whole_granules
from lowvram_db.progress import say

LESS_RAM = "close other programs, or let less live there: by a larger --vram, a smaller train.resolution or train.batch"
PIECE = 256 * 2**20  # bytes of RAM that are had at once: so much there is for a while beside what moves there
_SHARES = 1, 1 / 2, 1 / 4, 1 / 8, 0  # of the RAM, tried in turn


class Pinning:
    """RAM piece by piece, as much of each pinned as the system still allows: Windows pins half of a computer's RAM, a
    container may pin less.

    lanes: there.
    """

    def __init__(self, device: torch.device) -> None:
        gpu = device.type == "cuda"
        self.lanes: Lanes = Cuda(device) if gpu else MadeUpTime(lambda lane, size: 0.0)
        self._shares = list(_SHARES)

    def ram(self, total: int) -> Ram:
        """A piece, for parcels of so many bytes together, in whole granules."""
        while True:
            try:
                return Ram(self.lanes, total, int(total * self._shares[0]))
            except MemoryError as error:
                say(f"{error}: what is not is copied once more on its way to the card")
                del self._shares[0]


class Growing(Ram):
    """Homes in pieces of RAM that are had when they are wanted: who moves there tensor by tensor has little twice.

    total: bytes of homes, in whole granules, as far as it is known.
    """

    def __init__(self, pinning: Pinning, total: int) -> None:
        super().__init__(pinning.lanes, 0, 0)
        self._pinning, self._to_come = pinning, total
        self._pieces: list[Ram] = []

    def home(self, size: int) -> Home:
        whole = whole_granules(size)
        piece = next((piece for piece in self._pieces if piece.left >= whole), None)
        if piece is None:
            piece = self._pinning.ram(max(whole, min(PIECE, self._to_come)))
            self._pieces.append(piece)
        self._to_come -= whole
        return piece.home(size)


def open_ram(total: int, device: torch.device) -> tuple[Ram, Lanes]:
    """For homes of so many bytes, and the lanes there. Raises DoesNotFit where so much is not free."""
    check_free(total, LESS_RAM)
    pinning = Pinning(device)
    return Growing(pinning, total), pinning.lanes


def check_free(total: int, change: str) -> None:
    """Raises DoesNotFit where so many bytes of RAM are not free. change: what helps."""
    free = psutil.virtual_memory().available
    if total > free:
        raise DoesNotFit(f"needs {gib(total)} of RAM for what passes through the card, {gib(free)} are free; {change}")
