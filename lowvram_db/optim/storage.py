"""How Adam8 stores parameters and what it keeps beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowvram_db.kernels import bits
from lowvram_db.kernels.storage import flat
from lowvram_db.optim.bucket import Bucket
from lowvram_db.optim.layout import is_channels_last

Weights = Literal["bf16", "bf16+residual", "fp16", "fp32"]
DTYPES = {"bf16": torch.bfloat16, "bf16+residual": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOGETHER = 2**22  # elements, whose step takes some milliseconds on a CPU
SMALLEST = 4096  # elements; smaller tensors go into the bucket


def shapes(state: dict[str, Any]) -> dict[str, Any]:
    """What a parameter's state is made of: (shape, dtype) of its tensors."""
    return {key: (tuple(v.shape), v.dtype) if isinstance(v, Tensor) else "a number" for key, v in state.items()}


def runs(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """One after the other as many as have TOGETHER elements: small ones by hundreds, large ones alone."""
    run, elements = list[nn.Parameter](), 0
    for p in parameters:
        run.append(p)
        elements += p.numel()
        if elements >= TOGETHER:
            yield run
            run, elements = [], 0
    if run:
        yield run


def narrowing(weights: Weights) -> Callable[[Tensor], Tensor]:
    """What a weight may become while it is read without store() or bucket_of() missing a bit of it."""

    def narrow(weight: Tensor) -> Tensor:
        exact = weight.numel() < SMALLEST or weights == "bf16+residual"
        return weight if exact else weight.to(DTYPES[weights])

    return narrow


def store(p: nn.Parameter, weights: Weights, device: torch.device) -> dict[str, Any]:
    """Bring p to its device and dtype; returns what its state holds of it."""
    state: dict[str, Any] = {"channels_last": is_channels_last(p)}  # as the residual does
    exact = p.data.to(device)
    p.data = exact.to(DTYPES[weights])
    if weights == "bf16+residual":
        values = flat(exact).float()
        half = torch.full_like(values, 0x80, dtype=torch.int32)  # rounds to the nearest of 24 bits
        nearest, state["residual"] = bits.split_bf16(values, half)
        flat(p.data).copy_(nearest)
    return state


def bucket_of(parameters: list[nn.Parameter], weights: Weights, device: torch.device) -> Bucket | None:
    small = [p for p in parameters if p.numel() < SMALLEST]
    bucket = Bucket(small, device) if small else None
    for p in small:
        p.data = p.data.to(device, DTYPES[weights])
    return bucket


def refuse_shared_memory(parameters: list[nn.Parameter], names: list[str]) -> None:
    owners: dict[Any, str] = {}
    for p, name in zip(parameters, names, strict=True):
        if not _is_dense(p):
            raise ValueError(f"{name}: has gaps in memory (strides {p.stride()}); make it contiguous first")
        # Not by data_ptr(), which a plan's fake tensors lack.
        other = owners.setdefault((p.untyped_storage()._cdata, p.storage_offset()), name)
        if other != name:
            raise ValueError(
                f"{name} shares its memory with {other}: tied weights cannot step inside backward; untie them"
            )


def _is_dense(p: Tensor) -> bool:
    """Whether the elements lie side by side, in any order of the dimensions."""
    expected = 1
    for stride, size in sorted(zip(p.stride(), p.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True
