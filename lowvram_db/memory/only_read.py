"""A network that is only read, and by nobody else: on the device, or where it does not fit, with its weights in RAM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from lowvram_db.memory.device import lay_out, release_memory
from lowvram_db.memory.out_of_memory import is_out_of_memory
from lowvram_db.memory.stream.lent import Lent
from lowvram_db.memory.stream.pinning import check_free
from lowvram_db.progress import say

Result = TypeVar("Result")
_CHANGE = "close other programs"  # where RAM is not free


class OnlyRead:
    """network: on the CPU; where it computes from now on is the device. purpose: that of reading it, for who is told
    that it does not fit. streamed: whether its weights come from RAM from the first."""

    def __init__(self, network: Any, device: torch.device, purpose: str, streamed: bool = False) -> None:
        self.network, self._device, self._purpose = network, device, purpose
        self._lent: Lent | None = None
        if streamed:
            self._lend()
        else:
            self.come()

    @property
    def is_streamed(self) -> bool:
        return self._lent is not None

    def come(self) -> None:
        """To the device, where it is not there."""
        if not (self.is_streamed or self._does(lambda: lay_out(self.network.to(self._device), self._device))):
            self.stream()

    def leave(self) -> None:
        """Make way on the device, until it comes again; with its weights in RAM it is hardly there."""
        if not self.is_streamed:
            self.network.to("cpu")
            release_memory()

    def stream(self) -> None:
        """Let its weights come from RAM from now on, and say so. Raises DoesNotFit where that is not free."""
        self._go_to_ram()
        self._lend()

    def convert(self, dtype: torch.dtype) -> None:
        """Let it be of another precision. Raises DoesNotFit where that takes RAM that is not free."""
        if self._lent is None:
            if self._does(lambda: self.network.to(dtype)):
                return
            self._go_to_ram()
        check_free(sum(p.numel() * dtype.itemsize - p.nbytes for p in self.network.parameters()), _CHANGE)
        if self._lent is not None:
            self._lent.end()
            self._lent = None  # nor its room on the device
        self.network.to("cpu", dtype)
        self._lend()

    def read(self, work: Callable[[], Result]) -> Result:
        """What `work` makes of it; once more, with the weights in RAM, where memory does not suffice."""
        if not self.is_streamed:
            results: list[Result] = []
            if self._does(lambda: results.append(work())):
                return results[0]
            self.stream()
        return work()

    def _lend(self) -> None:
        lay_out(self.network, self._device)
        self._lent = Lent(self.network, self._device)
        release_memory()

    def _go_to_ram(self) -> None:
        say(f"{self._purpose}: out of memory; the denoiser's weights pass through from RAM from here on")
        check_free(sum(p.nbytes for p in _away(self.network)), _CHANGE)
        self.network.to("cpu")
        release_memory()

    @staticmethod
    def _does(work: Callable[[], object]) -> bool:
        """Whether memory suffices: whoever tries again must not do it inside `except`, which keeps it full."""
        try:
            work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True


def _away(network: nn.Module) -> list[nn.Parameter]:
    return [p for p in network.parameters() if p.device.type != "cpu"]
