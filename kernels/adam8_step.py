"""What of an AdamW step is the same for all weights: computed once, in float64, and handed to kernels/adam8.py."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor


class Step(NamedTuple):
    """The numbers of one optimizer step, the same for every weight of a parameter group."""

    lr: float
    decay: float  # 1 - lr * weight_decay
    eps: float
    keep_m: float  # m <- keep_m * m + add_m * g
    add_m: float
    keep_v: float  # v <- keep_v * v + add_v * g^2
    add_v: float
    decode: float  # m = decode * u * sqrt(v), of what the state holds
    encode: float  # u = encode * m / sqrt(v), of what it will hold
    unbias_m: float  # m_hat = unbias_m * m; 0: the weights do not move yet
    unbias_root: float  # sqrt(v_hat) = unbias_root * sqrt(v)
    foresee: float  # what an error of 1 in m adds to the sum of later m_hat
    clamp: float  # largest |m_hat| / (sqrt(v_hat) + eps)


@functools.lru_cache(maxsize=64)  # all tensors of a group ask for the same
def step_numbers(
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clamp: float = math.inf,
    micro_batch: int = 0,
    micro_batches: int = 1,
) -> Step:
    """The numbers of optimizer step 1, 2, ..., or of one of its micro-batches 0, 1, ...: each brings its share of the
    moments, the first lets the old ones decay, the last moves the weights; the others only take their rounding of m off
    them."""
    beta1, beta2 = betas
    first, root = 1 - beta1**step, math.sqrt(1 - beta2**step)
    decode = first / root
    keep_m, keep_v = 1.0, 1.0
    if micro_batch == 0:
        keep_m, keep_v = (beta1, beta2) if step > 1 else (0.0, 0.0)  # before step 1 the state means nothing
        decode = (1 - beta1 ** (step - 1)) / math.sqrt(1 - beta2 ** (step - 1)) if step > 1 else 0.0
    # Until beta1^k is below a millionth; but never further ahead than the run has come, or what was paid in advance and
    # is not back yet would be much of a short run's way.
    ahead = min(step, math.ceil(14 / (1 - beta1)))
    foresee = sum(beta1**k / (1 - beta1 ** (step + k)) for k in range(1, ahead + 1))
    last = micro_batch == micro_batches - 1
    return Step(
        lr=lr,
        decay=1 - lr * weight_decay if last else 1.0,
        eps=eps,
        keep_m=keep_m,
        add_m=(1 - beta1) / micro_batches,
        keep_v=keep_v,
        add_v=(1 - beta2) / micro_batches,
        decode=decode,
        encode=root / first,
        unbias_m=1 / first if last else 0.0,
        unbias_root=1 / root,
        foresee=foresee if last else foresee + 1 / first,
        clamp=clamp,
    )


@functools.lru_cache(maxsize=64)
def on_device(step: Step, device: torch.device) -> Tensor:
    """The numbers as float32 [13]: a compiled function takes new ones without being compiled anew."""
    return torch.tensor(step, dtype=torch.float32, device=device)
