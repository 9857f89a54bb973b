"""RAM for what passes through a device, as much of it pinned as the system allows."""

from __future__ import annotations

import psutil
import torch

from lowvram_db.errors import DoesNotFit
from lowvram_db.memory.size import gib
from lowvram_db.memory.stream.cuda import Cuda
from lowvram_db.memory.stream.lanes import Lanes
from lowvram_db.memory.stream.made_up import MadeUpTime
from lowvram_db.memory.stream.ram import Ram
from lowvram_db.progress import say

LESS_RAM = (
    "close other programs, or let less of the optimizer's state live there: by a larger --vram, a smaller "
    "train.resolution or train.batch"
)
_PINNED = 1, 1 / 2, 1 / 4, 1 / 8  # of the RAM, tried in turn


def open_ram(total: int, device: torch.device) -> tuple[Ram, Lanes]:
    """For parcels of so many bytes together, each rounded up to schedule.GRANULE; and the lanes there. Raises
    DoesNotFit where so much is not free. Windows pins half of a computer's RAM, a container may pin less."""
    free = psutil.virtual_memory().available
    if total > free:
        raise DoesNotFit(
            f"needs {gib(total)} of RAM for what passes through the card, {gib(free)} are free; {LESS_RAM}"
        )
    if device.type != "cuda":
        lanes = MadeUpTime(lambda lane, size: 0.0)
        return Ram(lanes, total, total), lanes
    for share in _PINNED:
        gpu = Cuda(device, staged=share < 1)
        try:
            return Ram(gpu, total, int(total * share)), gpu
        except MemoryError as error:
            gpu.close()
            say(f"{error}: what is not is copied once more on its way to the card")
    gpu = Cuda(device, staged=True)
    return Ram(gpu, total, 0), gpu
