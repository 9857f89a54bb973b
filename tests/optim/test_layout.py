import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowvram_db.kernels.moment_code import dequantize
from lowvram_db.optim.adam8 import Adam8
from lowvram_db.optim.layout import is_channels_last, relaid, same_order

SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))


def stepped(shape, layout, weights="bf16+residual"):
    """A parameter after three steps of Adam8, in which rows have gradients of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(shape, generator=generator).to(memory_format=layout))
    optimizer = Adam8([parameter], lr=1e-3, weights=weights)
    for _ in range(3):
        gradient = torch.randn(shape, generator=generator) * torch.logspace(-3, 1, shape[0]).view(-1, 1, 1, 1)
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
    return parameter, optimizer


def moments(state, parameter):
    """m and v in the parameter's shape, whatever the order they lie in."""
    n = parameter.numel()
    codes = nn.functional.pad(state["codes"], (0, -n % 256)).view(-1, 256)
    u, root = dequantize(codes, state["scales"].unsqueeze(1))
    flats = [(u * root).flatten()[:n], (root * root).flatten()[:n]]
    if not state["channels_last"]:
        return [flat.view(parameter.shape) for flat in flats]
    o, i, h, w = parameter.shape
    return [flat.view(o, h, w, i).permute(0, 3, 1, 2) for flat in flats]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_moments_are_those_of_the_same_weights_in_the_other_order(layout):
    parameter, optimizer = stepped((7, 100, 3, 3), layout)
    state = optimizer.state[parameter]
    assert state["channels_last"] == (layout == torch.channels_last)
    other = {**relaid(state, parameter.shape), "channels_last": not state["channels_last"]}
    (m, v), (m_other, v_other) = moments(state, parameter), moments(other, parameter)
    assert (v_other / v).log2().abs().max() <= 1 / 8, "half of the coarsest step of v that blocks have here, twice"
    assert ((m_other - m) / v.sqrt()).norm() / (m / v.sqrt()).norm() < 0.02
    assert not torch.equal(other["codes"], state["codes"])
    back = relaid(other, parameter.shape)
    assert torch.equal(back["residual"], state["residual"]), "every bit of the weights"
    assert not torch.equal(other["residual"], state["residual"])


@given(SHAPES, st.booleans(), st.booleans())
def test_the_order_of_a_tensor_is_that_of_its_memory(shape, one_last, other_last):
    """By the elements themselves, laid side by side."""
    tensor = torch.randn(shape)
    one, other = (
        tensor.clone(memory_format=torch.channels_last if last else torch.contiguous_format)
        for last in (one_last, other_last)
    )
    in_memory = [t.as_strided((t.numel(),), (1,)) for t in (one, other, tensor.permute(0, 2, 3, 1).contiguous())]
    assert same_order(one, other) == torch.equal(*in_memory[:2])
    assert is_channels_last(one) == (one_last and not torch.equal(in_memory[0], tensor.flatten())) and (
        not is_channels_last(one) or torch.equal(in_memory[0], in_memory[2])
    )


@pytest.mark.parametrize("weights", ["bf16", "bf16+residual", "fp16", "fp32"])
def test_every_bit_of_a_weight_goes_from_one_order_to_the_other(weights):
    straight, before = stepped((8, 64, 3, 3), torch.channels_last, weights)
    other = nn.Parameter(straight.detach().clone(memory_format=torch.contiguous_format))
    optimizer = Adam8([other], weights=weights)
    optimizer.load_state_dict(before.state_dict())
    for adam in (before, optimizer):
        adam.finish()
    assert torch.equal(straight, other)
