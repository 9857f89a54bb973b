"""Adafactor with next to no state, stepping when asked or inside backward, to the same bits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lowvram_db.kernels import adafactor
from lowvram_db.kernels.launch import Choice, Implementation
from lowvram_db.kernels.storage import flat
from lowvram_db.optim.in_backward import STREAM, InBackward
from lowvram_db.optim.layout import turned
from lowvram_db.optim.placement import Resident
from lowvram_db.optim.storage import DTYPES, SMALLEST, Weights, store


class Adafactor(InBackward):
    """Adafactor of kernels/adafactor.py: a float32 number a row and a column of every weight, beside the weight.

    params, weights, device, seed, max_norm: see InBackward.
    lr, weight_decay: may differ by group, and change between steps. lr: of an update whose root mean square is 1, as it
        about is, so that it means what it means to Adam.
    """

    numbers = len(adafactor.Step._fields)
    moments = ("rows", "columns")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-6,
        weight_decay: float = 0.01,
        *,
        weights: Weights = "bf16",
        seed: int = 0,
        max_norm: float | None = None,
        kernels: Choice | Implementation = "auto",
        device: torch.device | None = None,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "weight_decay": weight_decay},
            weights=weights,
            seed=seed,
            micro_batches=1,
            max_norm=max_norm,
            kernels=kernels,
            device=device,
            placement=Resident(),
        )

    def _make_state(self, weights: Weights, device: torch.device) -> None:
        for p in self._places:
            rows, columns = _sides(p.shape)
            zeros = {"rows": torch.zeros(rows, device=device), "columns": torch.zeros(columns, device=device)}
            if p.numel() >= SMALLEST:
                self.state[p] = {**zeros, **store(p, weights, device)}
            else:
                self.state[p] = {**zeros, "master": p.detach().to(device, torch.float32, copy=True).contiguous()}
                p.data = p.data.to(device, DTYPES[weights])

    def _numbers_of(self, group: dict[str, Any]) -> adafactor.Step:
        return adafactor.step_numbers(self.calls + 1, lr=group["lr"], weight_decay=group["weight_decay"])

    def _step_large(self, p: nn.Parameter, grad: Tensor, unscale: Tensor) -> None:
        state, width = self.state[p], p.numel() // _sides(p.shape)[0]
        columns = state["columns"]
        in_memory = columns.permute(1, 2, 0) if state["channels_last"] else columns
        laid_out = in_memory.reshape(-1)  # of a weight in channels last a copy
        residual = state.get("residual")
        self._step_matrix(
            p,
            flat(self._weight(p)).view(-1, width),
            None if residual is None else residual.view(-1, width),
            flat(grad).view(-1, width),
            laid_out,
            unscale,
        )
        if state["channels_last"]:
            in_memory.copy_(laid_out.view(in_memory.shape))

    def _step_small(self, number: int, unscale: Tensor) -> None:
        for p in self._small[number]:
            if p.grad is not None:
                master, width = self.state[p]["master"], p.numel() // _sides(p.shape)[0]
                columns = self.state[p]["columns"].view(-1)
                self._step_matrix(p, master.view(-1, width), None, p.grad.reshape(-1, width), columns, unscale)
                self._weight(p).copy_(master)

    def _step_matrix(
        self,
        p: nn.Parameter,
        weight: Tensor,
        residual: Tensor | None,
        grad: Tensor,
        columns: Tensor,
        unscale: Tensor,
    ) -> None:
        place = self._places[p]
        adafactor.update_(
            weight,
            residual,
            grad,
            self.state[p]["rows"],
            columns,
            unscale,
            self._numbers_by_group[self._group_of[p]],
            self._record_by_place[place],
            STREAM,
            self._kernels,
        )

    def _may_be_half_stepped(self) -> bool:
        return self._kernels != "triton"  # its twin works in chunks

    def _relaid(self, state: dict[str, Any], shape: torch.Size) -> dict[str, Any]:
        if "residual" not in state:
            return state
        return {**state, "residual": turned(state["residual"], shape, state["channels_last"])}


def _sides(shape: torch.Size) -> tuple[int, torch.Size]:
    """How many rows the matrix of a weight has, and the shape of its columns; a vector is a matrix of one row."""
    return (shape[0], shape[1:]) if len(shape) > 1 else (1, shape)
