"""Networks stored in half precision and computed in float32, for CPUs that only emulate arithmetic in half precision.

A layer widens its weights when it is called, and once more in its backward: there never is a second copy of the
network. Gradients arrive in the dtype that the weights are stored in.
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
    """Let every layer take its weights and inputs in float32 from now on, and give float32; in place. What is stored
    stays as it is, also where it changes its dtype later."""
    for module in network.modules():
        if any(parameter is not None for parameter in module._parameters.values()):
            kind: Any = type(module)
            module.__class__ = _widened(kind)


@cache
def _widened(kind: Any) -> Any:
    forward = {nn.Conv2d: _convolve, nn.Linear: _project}.get(kind, _call_widened)
    return type(kind.__name__, (kind,), {"forward": forward})


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _HALVES else value


def _convolve(layer: Any, x: Tensor) -> Tensor:
    return _Convolution.apply(
        _float(x), layer.weight, _float(layer.bias), layer.stride, layer.padding, layer.dilation, layer.groups
    )


def _project(layer: Any, x: Tensor) -> Tensor:
    return _Projection.apply(_float(x), layer.weight, _float(layer.bias))


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
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_sizes = None if bias is None else bias.shape
        ctx.geometry = stride, padding, dilation, False, (0, 0), groups
        return functional.conv2d(x, weight.float(), bias, stride, padding, dilation, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad, x, weight.float(), ctx.bias_sizes, *ctx.geometry, ctx.needs_input_grad[:3]
        )
        return grad_x, None if grad_weight is None else grad_weight.to(weight.dtype), grad_bias, *[None] * 4


class _Projection(torch.autograd.Function):
    """linear, likewise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return functional.linear(x, weight.float(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        wanted_x, wanted_weight, wanted_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = (rows @ weight.float()).view_as(x) if wanted_x else None
        grad_weight = (rows.T @ x.reshape(-1, x.shape[-1])).to(weight.dtype) if wanted_weight else None
        return grad_x, grad_weight, rows.sum(0) if wanted_bias else None
