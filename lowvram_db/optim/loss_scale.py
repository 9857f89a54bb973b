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
        self._optimizer, self._dynamic, self._interval = optimizer, dynamic, GROWTH_INTERVAL
        optimizer.scaled = dynamic
        optimizer.loss_scale.fill_(FIRST if dynamic else 1.0)
        self._good_steps = torch.zeros_like(optimizer.loss_scale, dtype=torch.int32)  # since the scale has changed

    def is_enabled(self) -> bool:
        """Such an optimizer looks at every gradient, with or without a scale."""
        return True

    def scale(self, loss: Tensor) -> Tensor:
        return loss * self._optimizer.loss_scale[0] if self._dynamic else loss

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()

    def update(self) -> None:
        """After a step: a new scale for the next one, on the device, for which nobody has to wait."""
        if self._dynamic:
            overflowed = (self._optimizer.skipped[:1] > 0).float()
            torch._amp_update_scale_(self._optimizer.loss_scale, self._good_steps, overflowed, 2.0, 0.5, self._interval)

    def set_growth_interval(self, steps: int) -> None:
        self._interval = steps

    def get_scale(self) -> float:
        return self._optimizer.loss_scale.item()

    def state_dict(self) -> dict[str, Any]:
        if not self._dynamic:
            return {}
        good_steps = int(self._good_steps.item())
        return {"scale": self.get_scale(), "good_steps": good_steps, "growth_interval": self._interval}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._dynamic:
            self._interval = state["growth_interval"]
            self._optimizer.loss_scale.fill_(state["scale"])
            self._good_steps.fill_(state["good_steps"] % self._interval)
