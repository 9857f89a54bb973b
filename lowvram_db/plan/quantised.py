"""What frozen matrices in few bits take, for a plan: bitsandbytes' own tensors cannot be fake ones."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowvram_db.memory.quantised import Base

_BLOCK = 64  # weights of nf4 that share a scale
_SCALE = 4  # bytes of one


def as_if_quantised(network: nn.Module, base: Base, compute: torch.dtype) -> None:
    """As memory.quantised.quantise does to a network, but for the numbers."""
    for name, layer in [named for named in network.named_modules() if type(named[1]) is nn.Linear]:
        network.set_submodule(name, _Narrow(layer, base, compute))


class _Narrow(nn.Linear):
    """Holds the bytes of its matrix, and has it in full for as long as it is multiplied with."""

    def __init__(self, layer: nn.Linear, base: Base, compute: torch.dtype):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.compute = layer.in_features, layer.out_features, compute
        self.weight = nn.Parameter(torch.empty(_bytes(layer, base), dtype=torch.uint8), requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = _Product.apply(x.to(self.compute), self.out_features, self.bias)
        return product.to(x.dtype)


def _bytes(layer: nn.Linear, base: Base) -> int:
    numel = layer.in_features * layer.out_features
    if base == "nf4":
        return numel // 2 + math.ceil(numel / _BLOCK) * _SCALE
    return numel + layer.out_features * _SCALE


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int, bias: Tensor | None) -> Tensor:
        ctx.shape = rows, x.shape[-1]
        return functional.linear(x, torch.empty(ctx.shape, dtype=x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad @ torch.empty(ctx.shape, dtype=grad.dtype), None, None
