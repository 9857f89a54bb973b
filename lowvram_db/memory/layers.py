"""Layers that ask for their weight when they compute, and once more in their backward: it may be elsewhere meanwhile,
or be stored otherwise than it is computed with. Autograd would keep it from the one moment to the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


class Lender(Protocol):
    """Who has the weights."""

    def weight_of(self, p: nn.Parameter, learning: bool) -> AbstractContextManager[Tensor]:
        """The weight of a layer, for a computation that is asked for inside. learning: whether a backward follows, or
        this is it; else nothing but forward passes is going on."""


def can_ask(module: nn.Module) -> bool:
    """Whether it is of a kind that can be made to ask."""
    return _kind(module) in _FORWARD


def lend(layer: Any, lender: Lender | None) -> None:
    """Let a layer ask `lender` for its weight from now on; None: its parameter is its weight again."""
    _ask(layer).lender = lender


def widen(layer: Any, room: Tensor) -> None:
    """Let a layer compute in float32, with its weight in `room`, where the next layer's comes after."""
    _ask(layer).room = room


def shown(memory: Tensor, p: nn.Parameter) -> Tensor:
    """What lies at the beginning of a memory, as the weight that it is: of its dtype, shape and order.

    memory: uint8 [at least p.nbytes]."""
    return memory[: p.nbytes].view(p.dtype).as_strided(p.shape, p.stride())


def is_half(value: Any) -> bool:
    """Whether it is a tensor in half precision."""
    return isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)


def widened(value: Any) -> Any:
    """In float32 where it is in half precision."""
    return value.float() if is_half(value) else value


class _Asking:
    """Beside torch's kind of layer."""

    lender: Lender | None = None
    room: Tensor | None = None

    def taken(self, value: Any) -> Any:
        """An input or bias as it is computed with."""
        return value if self.room is None else widened(value)

    @contextmanager
    def weighing(self, weight: Any, learning: bool) -> Iterator[Tensor]:
        """The weight as it is computed with. It learns where the layer's does: torch multiplies by one that does not
        with other kernels, and other bits, where rows lie askew."""
        with nullcontext(weight) if self.lender is None else self.lender.weight_of(weight, learning) as own:
            room = self.room
            used = own if room is None else room.as_strided(own.shape, own.stride()).copy_(own)
            yield used.detach().requires_grad_(weight.requires_grad)


@cache
def _asking(kind: type[nn.Module]) -> Any:
    return type(kind.__name__, (_Asking, kind), {"forward": _FORWARD[kind]})


def _kind(module: Any) -> Any:
    """Torch's kind of a layer, asking or not."""
    return type(module).__bases__[1] if isinstance(module, _Asking) else type(module)


def _ask(layer: Any) -> Any:
    layer.__class__ = _asking(_kind(layer))
    return layer


def _convolve(layer: Any, x: Tensor) -> Tensor:
    geometry = layer.stride, layer.padding, layer.dilation, layer.groups
    return _computed(_Convolution, layer, x, *geometry)


def _project(layer: Any, x: Tensor) -> Tensor:
    return _computed(_Projection, layer, x)


_FORWARD: dict[Any, Any] = {nn.Conv2d: _convolve, nn.Linear: _project}


def _computed(product: Any, layer: Any, x: Tensor, *geometry: Any) -> Tensor:
    x, bias = layer.taken(x), layer.taken(layer.bias)
    if torch.is_grad_enabled():
        result: Tensor = product.apply(x, layer.weight, bias, layer, *geometry)
        return result
    with layer.weighing(layer.weight, learning=False) as weight:
        return product.product(x, weight, bias, *geometry)


class _Convolution(torch.autograd.Function):
    """conv2d, whose backward is torch's own."""

    product = staticmethod(functional.conv2d)

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, bias: Tensor | None, layer: Any, *geometry: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer, ctx.bias_sizes = layer, None if bias is None else bias.shape
        stride, padding, dilation, groups = geometry
        ctx.geometry = stride, padding, dilation, False, (0, 0), groups
        with layer.weighing(weight, learning=True) as own:
            return functional.conv2d(x, own, bias, *geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,), weight = ctx.saved_tensors, ctx.layer.weight
        with ctx.layer.weighing(weight, learning=True) as own:
            grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
                grad, x, own, ctx.bias_sizes, *ctx.geometry, ctx.needs_input_grad[:3]
            )
        return grad_x, None if grad_weight is None else grad_weight.to(weight.dtype), grad_bias, *[None] * 5


class _Projection(torch.autograd.Function):
    """linear, whose backward is that of torch's."""

    product = staticmethod(functional.linear)

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, bias: Tensor | None, layer: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        with layer.weighing(weight, learning=True) as own:
            return functional.linear(x, own, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,), weight = ctx.saved_tensors, ctx.layer.weight
        wanted_x, wanted_weight, wanted_bias, _ = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        with ctx.layer.weighing(weight, learning=True) as own:
            grad_x = (rows @ own).view_as(x) if wanted_x else None
        grad_weight = (rows.T @ x.reshape(-1, x.shape[-1])).to(weight.dtype) if wanted_weight else None
        return grad_x, grad_weight, rows.sum(0) if wanted_bias else None, None
