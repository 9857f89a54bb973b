"""The exponential moving average of what is trained, in float32 and in the computer's memory.

A GPU holds no more than one tensor of it at a time.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lowvram_db.train.keeper import Keeper


class Average:
    """The average of trained weights, by their names."""

    def __init__(self, trained: Mapping[str, nn.Parameter], keeper: Keeper, decay: float):
        """It begins with the weights as they are."""
        self._trained, self._keeper, self._decay = trained, keeper, decay
        with keeper.at_rest():
            self.weights = {name: self._now(weight).clone() for name, weight in trained.items()}  # float32, on the CPU

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights that a step has left. step: how many have been made, this one counted."""
        with self._keeper.at_rest():
            for name, weight in self._trained.items():
                self.weights[name].lerp_(self._now(weight), 1 - kept(self._decay, step))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """For as long, the networks hold the average in their own precision; then the very weights of before."""
        with self._keeper.at_rest():
            live = {name: self._keeper.kept(weight) for name, weight in self._trained.items()}
            before = {name: weight.to("cpu", copy=True) for name, weight in live.items()}
        try:
            self._put(self.weights)
            yield
        finally:
            self._put(before)

    def replace(self) -> None:
        """Let the networks hold the average from now on, as it is. There is no training after that."""
        for name, weight in self._trained.items():
            weight.data = self.weights[name]

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        with self._keeper.at_rest():
            for name, weight in self._trained.items():
                self._keeper.kept(weight).copy_(values[name])

    @torch.no_grad()
    def _now(self, weight: nn.Parameter) -> Tensor:
        return self._keeper.exact(weight).detach().cpu().float()  # to the host as it is: half as many bytes


def kept(decay: float, step: int) -> float:
    """The share of the average that outlives a step, the first being 1: nothing outlives that; after n steps it is
    (1 + n) / (10 + n) for as long as that is less than the decay, or a short run would end where it began. The rule
    of diffusers' EMAModel."""
    before = step - 1
    return min(decay, (1 + before) / (10 + before)) if before else 0.0
