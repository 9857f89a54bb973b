"""Adafactor on a network: which way its steps are made changes no bit. The steps are tested in kernels/."""

import pytest
import torch
from torch import nn

from lowvram_db.optim.adafactor import Adafactor


def network():
    """Matrices, convolutions and vectors, large ones and small."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 40, 3),
        nn.GroupNorm(4, 40),
        nn.Conv2d(40, 40, 3),
        nn.Flatten(),
        nn.Linear(40 * 16, 5000),
        nn.Tanh(),
    )


def trained(weights="bf16", attach=False, resume_at=None, layout=torch.contiguous_format, steps=3, **settings):
    net = network().to(memory_format=layout)
    optimizer = Adafactor(net.named_parameters(), lr=1e-3, weights=weights, **settings)
    if attach:
        optimizer.attach()
    dtype = net[0].weight.dtype
    for step in range(steps):
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(step)).to(dtype)
        net(x).float().square().mean().backward()
        if attach:
            assert all(p.grad is None for p in net.parameters())
        optimizer.step()
        optimizer.zero_grad()
        if resume_at == step:
            saved, again = optimizer.state_dict(), network().to(memory_format=layout)
            tensors = {name: tensor.clone() for name, tensor in net.state_dict().items()}
            optimizer = Adafactor(again.named_parameters(), lr=1e-3, weights=weights, **settings)
            again.load_state_dict(tensors)
            optimizer.load_state_dict(saved)
            net = again
    return net, optimizer


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one[0].parameters(), other[0].parameters(), strict=True))


@pytest.mark.parametrize("weights", ["bf16", "bf16+residual", "fp32"])
def test_inside_backward_asked_for_or_resumed_the_bits_are_the_same(weights):
    asked = trained(weights)
    assert same(asked, trained(weights, attach=True))
    assert same(asked, trained(weights, resume_at=1))
    assert not same(asked, trained(weights, seed=1)) or weights == "fp32"


def test_channels_last_is_the_same_matrix():
    contiguous, last = trained("fp32"), trained("fp32", layout=torch.channels_last)
    assert not last[0][2].weight.is_contiguous()
    for one, other in zip(contiguous[0].parameters(), last[0].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6)
    state = last[1].state_dict()["state"]
    for place, own in contiguous[1].state_dict()["state"].items():  # by the shape of the weight, whatever its order
        torch.testing.assert_close(own["columns"], state[place]["columns"], rtol=1e-3, atol=1e-12)
    contiguous[1].load_state_dict(last[1].state_dict())
    for place, own in contiguous[1].state_dict()["state"].items():
        assert torch.equal(own["columns"], state[place]["columns"])


def test_next_to_nothing_is_kept_beside_the_weights():
    net, optimizer = trained("fp32", attach=True)
    weights = sum(p.numel() for p in net.parameters())
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    assert sum(t.nbytes for t in tensors) < 0.02 * weights
    optimizer.finish()
    assert {p.dtype for p in net.parameters()} == {torch.float32} and not any(optimizer.state.values())


def test_a_step_that_ran_out_of_memory_is_made_once():
    """Each parameter has gone one lr in the mean, or less; none has gone two."""
    net = network()
    optimizer = Adafactor(net.named_parameters(), lr=1e-3, weights="fp32", weight_decay=0.0)
    optimizer.attach()
    before = [p.detach().clone() for p in net.parameters()]
    handle = net[2].weight.register_hook(lambda _: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))
    x = torch.randn(2, 4, 8, 8)
    with pytest.raises(torch.OutOfMemoryError):
        net(x).square().mean().backward()
    handle.remove()
    assert optimizer.break_off() > 0
    net(x).square().mean().backward()
    optimizer.step()
    for old, p in zip(before, net.parameters(), strict=True):
        assert 0 < (p.detach() - old).square().mean().sqrt().item() < 1.01e-3
