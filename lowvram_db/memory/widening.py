"""Networks stored in half precision and computed in float32, for CPUs that only emulate arithmetic in half precision.

A layer widens its weights when it is called, and once more in its backward, into room for the largest that all share:
there never is a second copy of the network. Gradients arrive in the dtype that the weights are stored in.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn import functional

_HALVES = torch.bfloat16, torch.float16


def widen(network: nn.Module) -> None:
    """Let every layer that has weights in half precision take them and its inputs in float32 from now on, and give
    float32; in place. What is stored stays as it is, also where it changes its dtype later."""
    layers: list[Any] = [
        module
        for module in network.modules()
        if any(parameter.dtype in _HALVES for parameter in module.parameters(recurse=False))
    ]
    # One room, not a new tensor every time: the system takes eight times as long to hand out memory as to fill it.
    room = torch.empty(max((layer.weight.numel() for layer in layers if type(layer) in _LARGE), default=0))
    for layer in layers:
        kind: Any = type(layer)
        layer.room, layer.__class__ = room, _widened(kind)


@cache
def _widened(kind: Any) -> Any:
    return type(kind.__name__, (kind,), {"forward": _LARGE.get(kind, _call_widened)})


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _HALVES else value


def _in(room: Tensor, weight: Tensor) -> Tensor:
    """The weight in float32, until the next one comes."""
    return room.as_strided(weight.shape, weight.stride()).copy_(weight)


def _convolve(layer: Any, x: Tensor) -> Tensor:
    geometry = layer.stride, layer.padding, layer.dilation, layer.groups
    return _Convolution.apply(_float(x), layer.weight, _float(layer.bias), layer.room, *geometry)


def _project(layer: Any, x: Tensor) -> Tensor:
    return _Projection.apply(_float(x), layer.weight, _float(layer.bias), layer.room)


_LARGE: dict[Any, Any] = {nn.Conv2d: _convolve, nn.Linear: _project}


def _call_widened(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """For layers whose weights are few, or are not kept for backward: autograd may see them widened."""
    own = {name: _float(parameter) for name, parameter in layer.named_parameters(recurse=False)}
    if any(parameter.dtype in _HALVES for parameter in layer.parameters(recurse=False)):
        args, kwargs = tuple(map(_float, args)), {name: _float(value) for name, value in kwargs.items()}
        return functional_call(layer, own, args, kwargs)  # which comes here again, with nothing left to widen
    return super(type(layer), layer).forward(*args, **kwargs)


class _Convolution(torch.autograd.Function):
    """conv2d that keeps its weight as it is stored: autograd would keep the widened one."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, room: Tensor,
        stride: Any, padding: Any, dilation: Any, groups: int,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight)
        ctx.room, ctx.bias_sizes = room, None if bias is None else bias.shape
        ctx.geometry = stride, padding, dilation, False, (0, 0), groups
        return functional.conv2d(x, _in(room, weight), bias, stride, padding, dilation, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad, x, _in(ctx.room, weight), ctx.bias_sizes, *ctx.geometry, ctx.needs_input_grad[:3]
        )
        return grad_x, None if grad_weight is None else grad_weight.to(weight.dtype), grad_bias, *[None] * 5


class _Projection(torch.autograd.Function):
    """linear, likewise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, room: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.room = room
        return functional.linear(x, _in(room, weight), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        wanted_x, wanted_weight, wanted_bias, _ = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = (rows @ _in(ctx.room, weight)).view_as(x) if wanted_x else None
        grad_weight = (rows.T @ x.reshape(-1, x.shape[-1])).to(weight.dtype) if wanted_weight else None
        return grad_x, grad_weight, rows.sum(0) if wanted_bias else None, None
