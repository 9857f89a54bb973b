"""What of an AdamW step is the same for all weights: computed once, in float64, and handed to kernels/adam8.py."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple


class Step(NamedTuple):
    """The numbers of one optimizer step, the same for every weight of a parameter group.

    With m scaled by `ratio`, m_hat / (sqrt(v_hat) + eps) is m / (sqrt(v) + root_eps): that is the m of moment_code.py.
    """

    lr: float
    decay: float  # 1 - lr * weight_decay
    root_eps: float  # eps * sqrt(1 - beta2^t)
    ratio: float  # sqrt(1 - beta2^t) / (1 - beta1^t)
    keep_m: float  # m <- keep_m * m + add_m * g
    add_m: float
    keep_scaled: float  # the same for m scaled by the ratio, from that of the step before
    add_scaled: float
    keep_v: float  # v <- keep_v * v + add_v * g^2
    add_v: float
    moves: float  # 1; 0: the weights do not move yet
    foresee: float  # what an error of 1 in m adds to the sum of later m_hat


@functools.lru_cache(maxsize=64)  # all tensors of a group ask for the same
def step_numbers(
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    micro_batch: int = 0,
    micro_batches: int = 1,
) -> Step:
    """The numbers of optimizer step 1, 2, ..., or of one of its micro-batches 0, 1, ...: each brings its share of the
    moments, the first lets the old ones decay, the last moves the weights; the others only take their rounding of m off
    them."""
    beta1, beta2 = betas

    def ratio_after(t: int) -> float:
        return math.sqrt(1 - beta2**t) / (1 - beta1**t)

    ratio, last = ratio_after(step), micro_batch == micro_batches - 1
    keep_m, keep_v, keep_scaled = 1.0, 1.0, 1.0
    if micro_batch == 0:  # before step 1 the state means nothing
        keep_m, keep_v = (beta1, beta2) if step > 1 else (0.0, 0.0)
        keep_scaled = beta1 * ratio / ratio_after(step - 1) if step > 1 else 0.0
    # Until beta1^k is below a millionth; but never further ahead than the run has come, or what was paid in advance and
    # is not back yet would be much of a short run's way.
    ahead = min(step, math.ceil(14 / (1 - beta1)))
    foresee = sum(beta1**k / (1 - beta1 ** (step + k)) for k in range(1, ahead + 1)) * (1 - beta1**step)
    return Step(
        lr=lr,
        decay=1 - lr * weight_decay if last else 1.0,
        root_eps=eps * math.sqrt(1 - beta2**step),
        ratio=ratio,
        keep_m=keep_m,
        add_m=(1 - beta1) / micro_batches,
        keep_scaled=keep_scaled,
        add_scaled=(1 - beta1) / micro_batches * ratio,
        keep_v=keep_v,
        add_v=(1 - beta2) / micro_batches,
        moves=1.0 if last else 0.0,
        foresee=foresee if last else foresee + 1,
    )
