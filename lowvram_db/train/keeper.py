"""Where trained weights are between two steps: an optimizer may have them elsewhere than their layers do."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from lowvram_db.optim.kinds import StepsInBackward


class Keeper(Protocol):
    """Who knows, as a StepsInBackward does."""

    def kept(self, p: Any) -> Any:
        """A parameter where it lives, to be read and written."""

    def exact(self, p: Any) -> Any:
        """What is known of it at best, in whichever precision that has."""

    def at_rest(self) -> Any:
        """While either is read or written: a context manager."""


class Plain:
    """Of an optimizer whose parameters are what they hold."""

    def kept(self, p: Tensor) -> Tensor:
        return p.detach()

    def exact(self, p: Tensor) -> Tensor:
        return p.detach()

    def at_rest(self) -> AbstractContextManager[None]:
        return nullcontext()


def keeper_of(optimizer: torch.optim.Optimizer) -> Keeper:
    return optimizer if isinstance(optimizer, StepsInBackward) else Plain()
