"""On a CPU Adam8.step() hands its tensors to the C++ together: they end as those do that are stepped one by one."""

import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowvram_db.kernels import native
from lowvram_db.optim import storage
from lowvram_db.optim.adam8 import Adam8
from lowvram_db.optim.placement import Resident

pytestmark = pytest.mark.skipif(not native.works(), reason="there is no C++ compiler")

# Elements; some fill their last block, some do not; the last two have a [N, C, H, W].
SHAPES = st.lists(
    st.sampled_from([(4096,), (5000,), (64, 70), (300, 301), (8, 64, 3, 3), (40, 16, 3, 3)]), min_size=1, max_size=9
)


def made(shapes, weights, **settings):
    numbers = torch.Generator().manual_seed(len(shapes))
    parameters = [nn.Parameter(0.03 * torch.randn(shape, generator=numbers)) for shape in shapes]
    return parameters, Adam8(
        parameters, lr=1e-3, weights=weights, kernels="native", device=torch.device("cpu"), **settings
    )


def give_gradients(parameters, step, layout=torch.contiguous_format, missing=(), broken=()):
    for place, p in enumerate(parameters):
        numbers = torch.Generator().manual_seed(100 * step + place)
        grad = (1e-4 * torch.randn(p.shape, generator=numbers)).to(p.dtype)
        grad = grad.to(memory_format=layout) if grad.dim() == 4 else grad
        if place in broken:
            grad.view(-1)[7] = torch.nan
        p.grad = None if place in missing else grad


def run_backward(parameters):
    """To the gradients that are there."""
    grads = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    sum((p * grad).float().sum() for p, grad in zip(parameters, grads, strict=True)).backward()
    assert all(p.grad is None for p in parameters)


def everything(parameters, optimizer):
    state = [value for p in parameters for value in optimizer.state[p].values() if isinstance(value, torch.Tensor)]
    return [p.detach().clone() for p in parameters] + [value.clone() for value in state] + [optimizer.skipped.clone()]


def stepped(monkeypatch, shapes, weights, steps=3, together=10_000, attach=False, settings=None, **gradients):
    """After some steps; together=None: one by one, as a streamed placement steps them; attach: inside backward."""
    with monkeypatch.context() as patched:
        if together is None:
            patched.setattr(Resident, "stays", False)
        else:
            patched.setattr(storage, "TOGETHER", together)
        parameters, optimizer = made(shapes, weights, **(settings or {}))
        if attach:
            optimizer.attach()
        for step in range(steps):
            give_gradients(parameters, step, **gradients)
            if attach:
                run_backward(parameters)
            optimizer.step()
    return everything(parameters, optimizer)


@given(SHAPES, st.sampled_from(["bf16", "bf16+residual", "fp16", "fp32"]), st.sampled_from([1, 10_000, 2**30]))
def test_together_and_one_by_one_give_the_same_bits(shapes, weights, together):
    monkeypatch = pytest.MonkeyPatch()
    alone = stepped(monkeypatch, shapes, weights, together=None)
    assert all(map(torch.equal, alone, stepped(monkeypatch, shapes, weights, together=together)))
    assert all(map(torch.equal, alone, stepped(monkeypatch, shapes, weights, attach=True)))
    assert not any(map(torch.equal, alone[:1], stepped(monkeypatch, shapes, weights, steps=2)))


@pytest.mark.parametrize(
    "more",
    [
        {"missing": (0, 2)},
        {"broken": (1,), "settings": {"max_norm": 1e-3}},
        {"settings": {"micro_batches": 2}},
    ],
)
def test_whatever_the_gradients_are(monkeypatch, more):
    shapes = [(4096,), (300, 301), (8, 64, 3, 3), (5000,)]
    alone = stepped(monkeypatch, shapes, "bf16", together=None, **more)
    assert all(map(torch.equal, alone, stepped(monkeypatch, shapes, "bf16", **more)))


def test_gradients_count_in_the_order_of_their_weights(monkeypatch):
    shapes = [(300, 301), (8, 64, 3, 3), (40, 16, 3, 3)]
    likewise = stepped(monkeypatch, shapes, "bf16")
    otherwise = stepped(monkeypatch, shapes, "bf16", layout=torch.channels_last)
    assert all(map(torch.equal, likewise, otherwise))


def test_small_ones_take_one_call_and_large_ones_do_not_wait(monkeypatch):
    calls: list[int] = []
    step = native.Together.step
    monkeypatch.setattr(native.Together, "step", lambda self, *given: (calls.append(len(given[0])), step(self, *given)))
    stepped(monkeypatch, [(4096,)] * 7 + [(300, 301), (4096,)], "bf16", steps=1, together=20_000)
    assert calls == [5, 3, 1]


class Elsewhere(Resident):
    """Keeps a copy of the state."""

    def keep(self, p, state):
        return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in state.items()}


@pytest.mark.parametrize("put", ["a weight", "the state"])
def test_what_was_put_elsewhere_is_stepped_there(put):
    shapes = [(4096,), (5000,)]
    stays, moves = made(shapes, "bf16+residual"), made(shapes, "bf16+residual")
    kept = []
    for step in range(3):
        for parameters, optimizer in (stays, moves):
            give_gradients(parameters, step)
            optimizer.step()
        (_, last), optimizer = moves
        kept += [last.data, *optimizer.state[last].values()]  # so that nothing new gets their memory
        if put == "a weight":
            last.data = last.data.clone()
        else:
            optimizer.place(Elsewhere())
    assert all(map(torch.equal, everything(*stays), everything(*moves)))


def test_where_there_are_no_values_there_is_nothing_to_do():
    with FakeTensorMode():
        parameters, optimizer = made([(4096,), (300, 301)], "bf16")
        for p in parameters:
            p.grad = torch.empty_like(p)
        optimizer._step_each(parameters)


def test_nothing_of_the_state_is_in_memory_when_all_has_ended():
    parameters, optimizer = made([(4096,)], "bf16")
    give_gradients(parameters, 0)
    optimizer.step()
    codes = weakref.ref(optimizer.state[parameters[0]]["codes"])
    optimizer.finish()
    assert codes() is None
