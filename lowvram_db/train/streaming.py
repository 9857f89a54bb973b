"""Which of the optimizer's state lives in RAM under a strategy, and by which lanes it passes through the card."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import psutil
import torch
from torch import Tensor, nn

from lowvram_db.errors import DoesNotFit
from lowvram_db.memory.size import gib
from lowvram_db.memory.stream.cuda import Cuda
from lowvram_db.memory.stream.lanes import Lanes
from lowvram_db.memory.stream.made_up import MadeUpTime
from lowvram_db.memory.stream.ram import Ram
from lowvram_db.optim.placement import Imagined, Placement, Resident, Streamed, state_bytes
from lowvram_db.optim.storage import Weights
from lowvram_db.progress import say
from lowvram_db.train.strategy import EIGHTHS, Strategy

ROOM = 256 * 2**20  # bytes of the card that state passes through, at the most
PASSING = 2  # of the largest states at the least: one is stepped while the other comes
LESS_RAM = (
    "close other programs, or let less of the optimizer's state live there: by a larger --vram, a smaller "
    "train.resolution or train.batch"
)
PINNED = 1, 1 / 2, 1 / 4, 1 / 8  # of the RAM, tried in turn


def placement(
    strategy: Strategy,
    order: Sequence[nn.Parameter],
    weights: Weights,
    device: torch.device,
    imagined: Callable[[int], Tensor] | None,
) -> Placement:
    """order: of larger tensors' gradients in backward. imagined: gives so many bytes of the card, where tensors have no
    values. Raises DoesNotFit where the RAM is not free."""
    chosen = share(order, strategy.streamed, weights)
    if not chosen:
        return Resident()
    total, room = sum(chosen.values()), room_for(list(chosen.values()), strategy.streamed)
    if imagined:
        return Imagined(chosen, imagined(room))
    _check_free(total)
    return Streamed(list(chosen), room, *_ram(total, device))


def room_for(sizes: Sequence[int], eighths: int) -> int:
    """Bytes of the card that states of these sizes pass through: with the last eighth the least there can be, for who
    comes to that has no more to give."""
    least = PASSING * max(sizes)
    return least if eighths == EIGHTHS else max(least, min(ROOM, sum(sizes) // 4))


def share(order: Sequence[nn.Parameter], eighths: int, weights: Weights) -> dict[nn.Parameter, int]:
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


def _check_free(wanted: int) -> None:
    free = psutil.virtual_memory().available
    if wanted > free:
        raise DoesNotFit(f"needs {gib(wanted)} of RAM for the optimizer's state, {gib(free)} are free; {LESS_RAM}")


def _ram(total: int, device: torch.device) -> tuple[Ram, Lanes]:
    """As much of it pinned as can be: Windows pins half of a computer's RAM, a container may pin less."""
    if device.type != "cuda":
        lanes = MadeUpTime(lambda lane, size: 0.0)
        return Ram(lanes, total, total), lanes
    for share in PINNED:
        gpu = Cuda(device, staged=share < 1)
        try:
            return Ram(gpu, total, int(total * share)), gpu
        except MemoryError as error:
            gpu.close()
            say(f"{error}: what is not is copied once more on its way to the card")
    gpu = Cuda(device, staged=True)
    return Ram(gpu, total, 0), gpu
