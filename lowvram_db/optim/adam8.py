"""Adam8: AdamW with 16 bits of state a weight, stepping when asked or inside backward, to the same bits.

optimizer = Adam8(unet.named_parameters(), lr=2e-6)
handle = optimizer.attach()  # from now on backward updates each weight when its gradient exists, and frees that
for batch in batches:
    loss_of(batch).backward()
    optimizer.step()  # ends the step; without attach() it does all the work
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from lowvram_db.kernels import adam8, native
from lowvram_db.kernels.adam8_step import Step, step_numbers
from lowvram_db.kernels.launch import Choice, Implementation
from lowvram_db.optim.in_backward import STREAM, InBackward
from lowvram_db.optim.layout import relaid
from lowvram_db.optim.placement import Placement, Resident
from lowvram_db.optim.storage import SMALLEST, Weights, bucket_of, runs, store


class Adam8(InBackward):
    """AdamW (Loshchilov & Hutter 2019) on the 16-bit state of kernels/moment_code.py: 4.02 bytes a bf16 weight in all.

    params, weights, device, seed, max_norm: see InBackward. Tensors under 4,096 elements have float32 moments.
    lr, betas, eps, weight_decay: may differ by group, and change between steps. Adam's updates of more than 1.5 lr,
        which are rare, count nine tenths, but no less than 1.5 lr: most of them here are an error of the 16 bits
        (docs/adam8.md).
    micro_batches: how many backwards, each followed by step(), make one step of the weights. m gathers the mean of
        their gradients and v the mean of their squares (AdamA, Zhang et al. 2023, takes v smaller by their number):
        nothing has to hold a sum of gradients.
    placement: where the state of larger tensors lives, see placement.py; resident if None. The bits are the same.
    """

    numbers = len(Step._fields)
    moments = ("codes", "scales")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-6,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        weights: Weights = "bf16",
        seed: int = 0,
        micro_batches: int = 1,
        max_norm: float | None = None,
        kernels: Choice | Implementation = "auto",
        device: torch.device | None = None,
        placement: Placement | None = None,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay},
            weights=weights,
            seed=seed,
            micro_batches=micro_batches,
            max_norm=max_norm,
            kernels=kernels,
            device=device,
            placement=placement or Resident(),
        )

    def _make_state(self, weights: Weights, device: torch.device) -> None:
        self._step_of: dict[nn.Parameter, native.Together] = {}  # of the run that begins with it
        for p in self._places:
            if p.numel() >= SMALLEST:
                made = {**adam8.zero_state(p.numel(), device), **store(p, weights, device)}
                self.state[p] = self._placement.keep(p, made)
        self._buckets = [bucket_of(group["params"], weights, device) for group in self.param_groups]
        for bucket in filter(None, self._buckets):
            self.state.update({p: {**state} for p, state in zip(bucket.parameters, bucket.states, strict=True)})

    def _numbers_of(self, group: dict[str, Any]) -> Step:
        step, micro_batch = divmod(self.calls, self._micro_batches)
        return step_numbers(
            step + 1,
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            micro_batch=micro_batch,
            micro_batches=self._micro_batches,
        )

    def _step_large(self, p: nn.Parameter, grad: Tensor, unscale: Tensor) -> None:
        with self._placement.lent(p, self.state[p]) as (weight, state):
            adam8.update_(
                self._weight(weight),
                state.get("residual"),
                grad,
                state["codes"],
                state["scales"],
                unscale,
                self._numbers_by_group[self._group_of[p]],
                self._record_by_place[self._places[p]],
                STREAM,
                self._kernels,
            )

    def _step_each(self, parameters: list[nn.Parameter]) -> None:
        values = not any(isinstance(p.data, FakeTensor) for p in parameters[:1])
        if not (self._kernels == "native" and self._placement.stays and values and native.works()):
            super()._step_each(parameters)
            return
        for run in runs(parameters):
            self._together(run).step(*self._prepared(run))

    def _together(self, parameters: list[nn.Parameter]) -> native.Together:
        together = self._step_of.get(parameters[0])
        if together is None or not together.is_for(parameters):
            states = [self.state[p] for p in parameters]
            together = self._step_of[parameters[0]] = native.Together(
                [
                    (p, state.get("residual"), state["codes"], state["scales"],
                     self._numbers_by_group[self._group_of[p]], self._record_by_place[self._places[p]])
                    for p, state in zip(parameters, states, strict=True)
                ],
                STREAM,
            )  # fmt: skip
        return together

    def _let_go(self) -> None:
        self._step_of.clear()

    def _step_small(self, number: int, unscale: Tensor) -> None:
        bucket = self._buckets[number]
        assert bucket is not None
        skipped = bucket.update_(Step(*self._numbers_by_group[number].unbind()), unscale)
        self._record_by_place[self._places[bucket.parameters[0]]][adam8.SKIPPED].add_(skipped)

    def _may_be_half_stepped(self) -> bool:
        return not adam8.steps_at_once(self._kernels)

    def _relaid(self, state: dict[str, Any], shape: torch.Size) -> dict[str, Any]:
        return relaid(state, shape)
