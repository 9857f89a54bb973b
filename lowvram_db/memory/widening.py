"""Networks stored in half precision and computed in float32, for CPUs that only emulate arithmetic in half precision.

A layer widens its weights when it is called, and once more in its backward, into room for the largest that all share:
there never is a second copy of the network. Gradients arrive in the dtype that the weights are stored in.
"""

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from lowvram_db.memory import layers
from lowvram_db.memory.layers import is_half, widened


def widen(network: nn.Module) -> None:
    """Let every layer that has weights in half precision take them and its inputs in float32 from now on, and give
    float32; in place. What is stored stays as it is, also where it changes its dtype later."""
    own: list[Any] = [module for module in network.modules() if any(map(is_half, module.parameters(recurse=False)))]
    large = list(filter(layers.can_ask, own))
    # One room, not a new tensor every time: the system takes eight times as long to hand out memory as to fill it.
    room = torch.empty(max((layer.weight.numel() for layer in large), default=0))
    for layer in own:
        if layers.can_ask(layer):
            layers.widen(layer, room)
        else:
            kind: Any = type(layer)
            layer.__class__ = _widened(kind)


@cache
def _widened(kind: Any) -> Any:
    return type(kind.__name__, (kind,), {"forward": _call_widened})


def _call_widened(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """For layers whose weights are few, or are not kept for backward: autograd may see them widened."""
    own = {name: widened(parameter) for name, parameter in layer.named_parameters(recurse=False)}
    if any(map(is_half, layer.parameters(recurse=False))):
        args, kwargs = tuple(map(widened, args)), {name: widened(value) for name, value in kwargs.items()}
        return functional_call(layer, own, args, kwargs)  # which comes here again, with nothing left to widen
    return super(type(layer), layer).forward(*args, **kwargs)
