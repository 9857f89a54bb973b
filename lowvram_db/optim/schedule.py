"""The learning rate as a function of the step: nothing to save, nothing to resume."""

import math


def learning_rate(step: int, *, schedule: str, lr: float, warmup: int, steps: int) -> float:
    """Learning rate of step 0 <= step < steps.

    Warm-up rises linearly and is at lr / warmup, not zero, in step 0, so that no step is wasted. Then: "constant"
    stays, "linear" and "cosine" fall towards zero at `steps`.
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    if schedule == "constant":
        return lr
    progress = (step - warmup) / max(1, steps - warmup)
    return lr * (1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2)
