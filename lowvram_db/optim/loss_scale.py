"""The loss scale of an optimizer that steps inside backward, with the methods of torch.amp.GradScaler."""

from typing import Any

import torch
from torch import Tensor

from lowvram_db.optim.kinds import StepsInBackward

FIRST = 2.0**16
GROWTH_INTERVAL = 2000  # steps without an overflow after which it doubles


class LossScale:
    """fp16 gradients need one: too small a scale loses faint gradients, too large a one overflows.

    A tensor with an overflow in its gradient is left as it was, the others are stepped; the scale is then halved.
    """

    def __init__(self, optimizer: StepsInBackward, dynamic: bool) -> None:
        """dynamic: False keeps the scale at 1, for bf16 and float32."""
        self._optimizer, self._dynamic = optimizer, dynamic
        optimizer.scaled = dynamic
        self._scale, self._good_steps, self._interval = FIRST if dynamic else 1.0, 0, GROWTH_INTERVAL

    def is_enabled(self) -> bool:
        """Such an optimizer looks at every gradient, with or without a scale."""
        return True

    def scale(self, loss: Tensor) -> Tensor:
        self._optimizer.loss_scale.fill_(self._scale)
        return loss * self._scale

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()

    def update(self) -> None:
        """Raises FloatingPointError where gradients stay non-finite (see StepsInBackward.count_skipped)."""
        skipped = self._optimizer.count_skipped()
        if not self._dynamic:
            return
        self._good_steps = 0 if skipped else self._good_steps + 1
        if skipped:
            self._scale /= 2
        elif self._good_steps % self._interval == 0:
            self._scale *= 2

    def set_growth_interval(self, steps: int) -> None:
        self._interval = steps

    def get_scale(self) -> float:
        return self._scale

    def state_dict(self) -> dict[str, Any]:
        if not self._dynamic:
            return {}
        return {"scale": self._scale, "good_steps": self._good_steps, "growth_interval": self._interval}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._dynamic:
            self._scale, self._good_steps = state["scale"], state["good_steps"]
            self._interval = state["growth_interval"]
