"""A layer that asks for its weight is, to the bit, torch's own, wherever the weight is between two askings."""

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lowvram_db.memory import layers

LAYERS = {
    "convolution": (lambda: nn.Conv2d(6, 4, 3, padding=1), (2, 6, 5, 7)),
    "convolution that halves, without bias": (lambda: nn.Conv2d(6, 4, 3, stride=2, bias=False), (2, 6, 5, 7)),
    "convolution in groups, with gaps": (lambda: nn.Conv2d(6, 4, 3, dilation=(1, 2), groups=2), (2, 6, 5, 7)),
    "linear": (lambda: nn.Linear(6, 4), (2, 6)),
    "linear of tokens": (lambda: nn.Linear(6, 4), (2, 3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), (2, 3, 6)),
}


class Desk:
    """Has the weights; beside a computation the parameters hold nothing that is a number."""

    def __init__(self, network):
        self.asked = []  # whether something was learned, for each asking
        self.weights = {
            layer.weight: layer.weight.detach().clone() for layer in network.modules() if layers.can_ask(layer)
        }
        for layer in network.modules():
            if layers.can_ask(layer):
                layers.lend(layer, self)
                layer.weight.data.fill_(torch.nan)

    @contextmanager
    def weight_of(self, p, learning):
        self.asked.append(learning)
        lent = layers.shown(torch.empty(p.nbytes, dtype=torch.uint8), p).copy_(self.weights[p])
        yield lent
        lent.fill_(torch.nan)  # the place is somebody else's now


def pair(build):
    torch.manual_seed(0)
    own = build()
    return own, copy.deepcopy(own)


def run(network, shape, dtype=torch.float32, forward=lambda network, x: network(x)):
    """What it gives, and the gradients of its input and parameters."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    y = forward(network, x)
    (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in network.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_that_asks_is_torchs_own(name, dtype):
    build, shape = LAYERS[name]
    asking, own = pair(lambda: build().to(dtype))
    desk = Desk(asking)
    given, wanted = run(asking, shape, dtype), run(own, shape, dtype)
    assert all(torch.equal(a, b) for a, b in zip(given, wanted, strict=True))
    assert desk.asked == [True, True], "in the forward pass and in backward"
    with torch.no_grad():
        x = torch.randn(shape, dtype=dtype)
        assert torch.equal(asking(x), own(x))
    assert desk.asked[2:] == [False]


class Recorded(TorchDispatchMode):
    """What torch is asked to compute."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.operations.append(operation)
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", ["lent", "widened"])
@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_tokens_that_lie_askew_go_through_the_same_kernels(way, learns, grad):
    """Torch folds their rows together before it multiplies by a weight that learns, and else does not; on a GPU the
    bits differ."""
    asking, own = pair(lambda: nn.Linear(6, 4))
    if way == "lent":
        Desk(asking)
    else:
        layers.widen(asking, torch.empty(24))
    tokens = torch.randn(2, 6, 3).transpose(1, 2)
    found = []
    for network in (asking, own):
        network.weight.requires_grad_(learns)
        with torch.set_grad_enabled(grad), Recorded() as recorded:
            network(tokens)
        found.append({o for o in recorded.operations if o in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)})
    assert found[0] == found[1] and len(found[0]) == 1


def test_who_recomputes_asks_once_more():
    asking, own = pair(lambda: nn.Sequential(nn.Linear(6, 5), nn.SiLU(), nn.Linear(5, 4)))
    desk = Desk(asking)

    def recomputed(network, x):
        return checkpoint(network, x, use_reentrant=False)

    given, wanted = run(asking, (3, 6), forward=recomputed), run(own, (3, 6), forward=recomputed)
    assert all(torch.equal(a, b) for a, b in zip(given, wanted, strict=True))
    assert len(desk.asked) == 2 + 2 + 2


def test_a_frozen_layer_asks_as_well():
    asking, own = pair(lambda: nn.Linear(6, 4))
    desk = Desk(asking)
    for network in (asking, own):
        network.weight.requires_grad_(False)
    given, wanted = run(asking, (2, 6)), run(own, (2, 6))
    assert all(torch.equal(a, b) for a, b in zip(given[:2], wanted[:2], strict=True)) and given[2] is None
    assert desk.asked == [True, True]


def test_its_parameter_is_its_weight_again_where_nobody_lends():
    asking, own = pair(lambda: nn.Linear(6, 4))
    desk = Desk(asking)
    layers.lend(asking, None)
    asking.weight.data = desk.weights[asking.weight]
    assert all(torch.equal(a, b) for a, b in zip(run(asking, (2, 6)), run(own, (2, 6)), strict=True))
    assert desk.asked == []


def test_a_layer_that_asks_and_is_widened_computes_what_a_widened_one_does():
    asking, own = pair(lambda: nn.Linear(6, 4).to(torch.bfloat16))
    Desk(asking)
    for layer in (asking, own):
        layers.widen(layer, torch.empty(24))
    assert all(torch.equal(a, b) for a, b in zip(run(asking, (2, 6)), run(own, (2, 6)), strict=True))


def test_memory_is_shown_as_the_weight_that_lies_there():
    weight = nn.Parameter(torch.randn(4, 6, 3, 3).to(torch.bfloat16, memory_format=torch.channels_last))
    memory = torch.zeros(2 * weight.nbytes, dtype=torch.uint8)
    layers.shown(memory, weight).copy_(weight.detach())
    shown = layers.shown(memory, weight)
    assert torch.equal(shown, weight) and shown.stride() == weight.stride()
    assert memory[weight.nbytes :].count_nonzero() == 0
