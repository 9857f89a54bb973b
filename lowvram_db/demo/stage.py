"""One stage of pre-training: fit a module with AdamW, keep its running average, survive being killed.

Every batch is a function of the step alone, so a resumed stage goes on exactly where it was. The learning rate rises
for `warmup` steps, stays, and falls as a cosine over the last `decay` share of the steps.
"""

from __future__ import annotations

import copy
import csv
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowvram_db.atomic import replacing_file

CHECKPOINT_SECONDS = 120.0
REPORT_STEPS = 50


@dataclass(frozen=True)
class Budget:
    """How long and how fast a stage learns."""

    steps: int
    batch: int
    lr: float
    warmup: int = 200
    decay: float = 0.4
    average: float = 0.999
    weight_decay: float = 0.01
    measure_steps: int = 1000

    def lr_at(self, step: int) -> float:
        rise = min(1.0, (step + 1) / self.warmup)
        fall_from = self.steps * (1 - self.decay)
        share = min(1.0, max(0.0, (step - fall_from) / max(1.0, self.steps - fall_from)))
        return self.lr * rise * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))


@dataclass
class Fit:
    """A module on its way: its average, its optimizer, its step. Files: NAME.pt (on the way), NAME.safetensors."""

    name: str
    module: nn.Module
    budget: Budget
    folder: Path

    def __post_init__(self) -> None:
        self.average = copy.deepcopy(self.module).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(), lr=self.budget.lr, betas=(0.9, 0.99), weight_decay=self.budget.weight_decay
        )
        self.step, self.seconds = 0, 0.0

    @property
    def finished(self) -> Path:
        return self.folder / f"{self.name}.safetensors"

    def run(self, loss_of: Callable[[int], Tensor], measure: Callable[[nn.Module], dict[str, float]]) -> nn.Module:
        """Learns until the budget is spent and returns the module holding its average; returns at once if it was
        finished before. `loss_of(step)` computes the loss on the step's own batch."""
        if self.finished.exists():
            self.module.load_state_dict(load_file(self.finished))
            return self.module.eval()
        self._resume()
        losses: list[float] = []
        saved = begun = time.monotonic()
        while self.step < self.budget.steps:
            losses.append(self._advance(loss_of))
            now = time.monotonic()
            if self.step % REPORT_STEPS == 0 or self.step == self.budget.steps:
                values = {"loss": sum(losses) / len(losses), "lr": self.budget.lr_at(self.step - 1)}
                if self.step % self.budget.measure_steps == 0 or self.step == self.budget.steps:
                    values |= measure(self.average.eval())
                self._report(values, self.seconds + now - begun)
                losses = []
            if now - saved > CHECKPOINT_SECONDS:
                self._save(self.seconds + now - begun)
                saved = now
        self.module.load_state_dict(self.average.state_dict())
        with replacing_file(self.finished) as path:
            save_file({k: v.contiguous() for k, v in self.module.state_dict().items()}, path)
        return self.module.eval()

    def _advance(self, loss_of: Callable[[int], Tensor]) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.budget.lr_at(self.step)
        loss = loss_of(self.step)
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        keep = min(self.budget.average, self.step / (self.step + 10))
        with torch.no_grad():
            averages: list[Tensor] = list(self.average.parameters())
            values: list[Tensor] = list(self.module.parameters())
            torch._foreach_lerp_(averages, values, 1 - keep)
            for kept, now in zip(self.average.buffers(), self.module.buffers(), strict=True):
                kept.copy_(now)
        return loss.item()

    def _report(self, values: dict[str, float], seconds: float) -> None:
        path = self.folder / f"{self.name}.csv"
        fresh = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if fresh:
                writer.writerow(("step", "seconds", "metric", "value"))
            writer.writerows((self.step, round(seconds), key, f"{value:.6g}") for key, value in values.items())
        print(f"{self.name} {self.step}/{self.budget.steps} {seconds:.0f} s {values}", flush=True)

    def _save(self, seconds: float) -> None:
        state = {
            "module": self.module.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": seconds,
        }
        with replacing_file(self.folder / f"{self.name}.pt") as path:
            torch.save(state, path)

    def _resume(self) -> None:
        path = self.folder / f"{self.name}.pt"
        if path.exists():
            state = torch.load(path, weights_only=True)
            self.module.load_state_dict(state["module"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]
