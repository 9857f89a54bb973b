"""Adam8 as an optimizer: one result, whether it steps when asked or inside backward, straight or resumed."""

import copy
import gc
import math
import weakref
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch.utils.checkpoint import checkpoint

from lowvram_db.kernels import adam8, bits
from lowvram_db.kernels.storage import flat
from lowvram_db.optim.adam8 import Adam8
from lowvram_db.optim.bucket import Bucket
from lowvram_db.optim.in_backward import PATIENCE
from lowvram_db.optim.storage import SMALLEST
from lowvram_db.train.checkpoint import _flatten

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Network(nn.Module):
    """Two tensors above the bucket's limit, six below."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(8, 64, 3, padding=1)
        self.norm = nn.GroupNorm(4, 64)
        self.middle = nn.Conv2d(64, 64, 3, padding=1)
        self.last = nn.Conv2d(64, 8, 3, padding=1)

    def forward(self, x, checkpointing=False):
        def inner(h):
            return self.middle(nn.functional.silu(self.norm(h)))

        h = self.first(x)
        return self.last(checkpoint(inner, h, use_reentrant=False) if checkpointing else inner(h))


def loss_of(network, step, checkpointing=False):
    x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(step))
    dtype = network.middle.weight.dtype
    return (network(x.to(dtype), checkpointing).float() - x.flip(1)).square().mean()


def trained(steps=6, attach=False, checkpointing=False, layout=torch.contiguous_format, resume_at=None, **settings):
    """The network after some steps; `resume_at` goes on with a new network and optimizer from what was saved."""
    network = Network().to(memory_format=layout)
    optimizer = Adam8(network.named_parameters(), lr=1e-3, kernels="torch", **settings)
    handle = optimizer.attach() if attach else None
    for step in range(steps):
        if step == resume_at:
            tensors, numbers = _flatten(optimizer.state_dict()["state"])
            state: dict[str, dict] = {"state": {}}
            for name, value in {**load(save(tensors)), **numbers}.items():
                place, key = name.split("/")
                state["state"].setdefault(int(place), {})[key] = value
            weights = copy.deepcopy(network.state_dict())
            network = Network().to(memory_format=layout)
            optimizer = Adam8(network.named_parameters(), lr=1e-3, kernels="torch", **settings)
            network.load_state_dict(weights)
            optimizer.load_state_dict(state)
            handle = optimizer.attach() if attach else None
        loss_of(network, step, checkpointing).backward()
        if handle:
            assert all(parameter.grad is None for parameter in network.parameters()), "backward frees every gradient"
        optimizer.step()
        optimizer.zero_grad()
    return network


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("weights", ["bf16", "bf16+residual", "fp16", "fp32"])
def test_inside_backward_or_not_straight_or_resumed_the_bits_are_the_same(weights, layout):
    straight = trained(weights=weights, layout=layout)
    assert not same(straight, trained(steps=5, weights=weights, layout=layout)), "nothing moves: nothing was compared"
    for way in (
        {"attach": True},
        {"attach": True, "checkpointing": True},
        {"checkpointing": True},
        {"resume_at": 3},
        {"attach": True, "resume_at": 1},
    ):
        assert same(straight, trained(weights=weights, layout=layout, **way)), way


@pytest.mark.parametrize("settings", [{"micro_batches": 3}, {"max_norm": 0.5}, {"weight_decay": 0.5}])
def test_each_setting_acts_alike_in_both_ways(settings):
    asked = trained(**settings)
    assert same(asked, trained(attach=True, checkpointing=True, **settings))
    assert same(asked, trained(resume_at=4, **settings))
    assert not same(asked, trained())


def test_parameters_in_channels_last_stay_so_and_are_stepped_in_place():
    network = Network().to(memory_format=torch.channels_last)
    optimizer = Adam8(network.named_parameters(), lr=1e-3)
    before, place = network.middle.weight.detach().clone(), network.middle.weight.data_ptr()
    loss_of(network, 0).backward()
    optimizer.step()
    weight = network.middle.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and weight.data_ptr() == place
    assert ((weight - before).float().abs() > 0).float().mean() > 0.9


def test_it_follows_torchs_adamw():
    """Every tensor, large and small, in float32, over 30 steps of a real loss."""
    ours, theirs = Network(), Network()
    settings = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}
    optimizers = [
        Adam8(ours.named_parameters(), weights="fp32", **settings),
        torch.optim.AdamW(theirs.parameters(), **settings),
    ]
    begin = [parameter.detach().clone() for parameter in ours.parameters()]
    for step in range(30):
        for network, optimizer in zip((ours, theirs), optimizers, strict=True):
            loss_of(network, step).backward()
            optimizer.step()
            optimizer.zero_grad()
    for a, b, start in zip(ours.parameters(), theirs.parameters(), begin, strict=True):
        assert ((a - b).norm() / (b - start).norm()).item() < 0.04


def test_state_is_as_small_as_promised():
    parameter = nn.Parameter(torch.randn(512, 512))
    optimizer = Adam8([parameter], weights="bf16")
    state = [value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor)]
    assert sum(value.nbytes for value in state) / parameter.numel() <= 2.03
    assert parameter.dtype == torch.bfloat16


def test_schedules_and_groups_reach_the_update():
    network = Network()
    groups = [
        {"params": list(network.first.parameters()), "lr": 0.0},
        {"params": [*network.norm.parameters(), *network.middle.parameters(), *network.last.parameters()]},
    ]
    optimizer = Adam8(groups, lr=1e-3, weights="fp32")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 2 else 0.0)
    history = []
    for step in range(4):
        history.append([p.detach().clone() for p in (network.first.weight, network.middle.weight, network.norm.bias)])
        loss_of(network, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    moved = [[not torch.equal(a, b) for a, b in zip(old, new, strict=True)] for old, new in pairwise(history)]
    assert moved == [[False, True, True], [False, True, True], [False, False, False]]


@pytest.mark.parametrize(("kernels", "device"), [("torch", "cpu"), ("triton", DEVICE)])
def test_what_is_captured_once_and_replayed_makes_the_steps_that_come(monkeypatch, kernels, device):
    """As a CUDA graph does: the first step's calls again, with the same arguments in the same memory."""

    def weights_after(steps, replayed):
        captured = []

        def capturing(call):
            def captures(*arguments):
                captured.append(lambda: call(*arguments))
                return call(*arguments)

            return captures

        generator = torch.Generator().manual_seed(0)
        parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((64, 128), (16,))]
        optimizer = Adam8(parameters, weights="bf16", kernels=kernels, device=torch.device(device))
        grads = [torch.empty_like(p) for p in parameters]
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
            for p, grad in zip(parameters, grads, strict=True):
                grad.copy_(torch.randn(grad.shape, generator=generator))
                p.grad = grad
            if replayed and step:
                optimizer.write_numbers()
                with torch.no_grad():
                    for call in captured:
                        call()
                optimizer.zero_grad()
            with monkeypatch.context() as patch:
                if replayed and not step:
                    patch.setattr(adam8, "update_", capturing(adam8.update_))
                    patch.setattr(Bucket, "update_", capturing(Bucket.update_))
                optimizer.step()
        return [p.detach() for p in parameters]

    asked, replayed = weights_after(3, replayed=False), weights_after(3, replayed=True)
    assert all(torch.equal(a, b) for a, b in zip(asked, replayed, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(asked, weights_after(2, replayed=False), strict=True))


def test_a_parameter_without_a_gradient_is_left_alone():
    network = Network()
    unused = nn.Parameter(torch.ones(7))
    optimizer = Adam8([*network.parameters(), unused], lr=1e-3)
    optimizer.attach()
    before = network.norm.bias.detach().clone()
    loss_of(network, 0).backward()
    optimizer.step()
    assert (unused == 1).all()
    assert not torch.equal(before, network.norm.bias), "the other small tensors do not wait for it"


@pytest.mark.parametrize("after_a_step", [False, True])
def test_nothing_keeps_an_attached_optimizer_and_its_weights_in_memory(after_a_step):
    network = Network()
    optimizer = Adam8(network.named_parameters())
    optimizer.attach()
    if after_a_step:
        loss_of(network, 0).backward()
        optimizer.step()
    gone = [weakref.ref(optimizer), *map(weakref.ref, network.parameters())]
    del network, optimizer
    gc.collect()
    assert [reference() for reference in gone] == [None] * len(gone)


def test_finish_gives_float32_back():
    network = Network()
    exact = [parameter.detach().clone() for parameter in network.parameters()]
    optimizer = Adam8(network.named_parameters(), weights="bf16+residual")
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    known = [optimizer.exact(parameter).clone() for parameter in network.parameters()]
    optimizer.finish()
    assert all(torch.equal(*pair) for pair in zip(known, network.parameters(), strict=True))
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    for before, after in zip(exact, network.parameters(), strict=True):
        torch.testing.assert_close(after.detach(), before, rtol=2**-16, atol=0)


@pytest.mark.parametrize(
    ("weights", "large"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_finish_takes_no_more_memory_for_what_is_not_known_better(weights, large):
    network = Network()
    optimizer = Adam8(network.named_parameters(), weights=weights)
    places = {p: p.data_ptr() for p in network.parameters() if p.numel() >= SMALLEST}
    optimizer.finish()
    assert {p: p.data_ptr() for p in places} == places and {p.dtype for p in places} == {large}
    assert {p.dtype for p in network.parameters() if p not in places} == {torch.float32}


# what users run into


def test_a_second_backward_before_step_is_refused_by_name():
    network = Network()
    optimizer = Adam8(network.named_parameters())
    optimizer.attach()
    loss = loss_of(network, 0)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"last\.\w+ received a second gradient before step\(\).*micro_batches=N"):
        loss.backward()


def test_tied_weights_are_refused_by_name():
    first, second = nn.Linear(64, 64), nn.Linear(64, 64)
    second.weight = nn.Parameter(first.weight.data)
    with pytest.raises(ValueError, match=r"second\.weight shares its memory with first\.weight.*untie"):
        Adam8(nn.ModuleDict({"first": first, "second": second}).named_parameters())


def test_weights_with_gaps_are_refused():
    with pytest.raises(ValueError, match="parameter 0: has gaps in memory"):
        Adam8([nn.Parameter(torch.zeros(100, 100)[:, ::2])])


def test_a_closure_is_refused():
    with pytest.raises(ValueError, match="no closure"):
        Adam8(Network().parameters()).step(lambda: None)


def test_attaching_twice_is_refused_and_remove_lets_go():
    network = Network()
    optimizer = Adam8(network.named_parameters())
    handle = optimizer.attach()
    with pytest.raises(RuntimeError, match="attached already"):
        optimizer.attach()
    handle.remove()
    loss_of(network, 0).backward()
    assert network.middle.weight.grad is not None
    optimizer.attach()


def test_a_state_of_another_optimizer_or_shape_is_refused_by_name():
    network = Network()
    adamw = torch.optim.AdamW(network.parameters())
    loss_of(network, 0).backward()
    adamw.step()
    optimizer = Adam8(network.named_parameters(), weights="fp32")
    with pytest.raises(ValueError, match=r"first\.weight: this state is not Adam8's"):
        optimizer.load_state_dict(adamw.state_dict())
    wider = nn.Conv2d(8, 128, 3)
    with pytest.raises(ValueError, match=r"weight: this state is not Adam8's"):
        optimizer.load_state_dict(Adam8(wider.named_parameters()).state_dict())


@pytest.mark.parametrize("attach", [True, False])
@pytest.mark.parametrize("name", ["middle.weight", "norm.bias"])
def test_gradients_that_are_no_numbers_are_counted_and_end_it_in_time(name, attach):
    network = Network()
    optimizer = Adam8(network.named_parameters())
    parameter = dict(network.named_parameters())[name]
    parameter.register_hook(lambda grad: torch.full_like(grad, math.nan))
    if attach:
        optimizer.attach()
    before = parameter.detach().clone()

    def step():
        loss_of(network, 0).backward()
        optimizer.step()
        optimizer.zero_grad()
        return optimizer.check_skipped(optimizer.skipped.tolist())

    with pytest.warns(UserWarning, match="is not finite"):
        assert step() == 1
    assert torch.equal(before, parameter)
    for _ in range(PATIENCE - 2):
        assert step() == 1
    with pytest.raises(FloatingPointError, match=f"not finite in {PATIENCE} steps in a row"):
        step()


def test_a_good_step_begins_the_count_anew():
    network = Network()
    optimizer = Adam8(network.named_parameters())
    for bad in [True, False] * PATIENCE:
        loss_of(network, 0).backward()
        if bad:
            network.middle.weight.grad[0] = math.inf
        optimizer.step()
        optimizer.zero_grad()
        if bad:
            with pytest.warns(UserWarning):
                assert optimizer.check_skipped(optimizer.skipped.tolist()) == 1
        else:
            assert optimizer.check_skipped(optimizer.skipped.tolist()) == 0


# clipping and accumulation


def global_norm(network):
    return math.sqrt(sum(p.grad.float().square().sum().item() for p in network.parameters()))


def test_max_norm_goes_by_the_step_before():
    network = Network()
    optimizer = Adam8(network.named_parameters(), weights="fp32", max_norm=0.1, lr=1e-9)
    loss_of(network, 0).backward()
    norm = global_norm(network)
    assert optimizer._unscale().item() == 1.0, "nothing is known before the first step"
    optimizer.step()
    assert optimizer._unscale().item() == pytest.approx(0.1 / norm, rel=1e-5)


def test_a_loss_scale_is_taken_off():
    plain = trained(weights="fp32")
    network = Network()
    optimizer = Adam8(network.named_parameters(), lr=1e-3, weights="fp32", kernels="torch")
    optimizer.loss_scale.fill_(1024.0)
    for step in range(6):
        (loss_of(network, step) * 1024).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert same(plain, network)


def test_flat_is_the_memory_itself():
    tensor = torch.arange(24.0).view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    flat(tensor)[1] = -1
    assert tensor[0, 1, 0, 0] == -1


def test_small_tensors_keep_a_float32_copy():
    """A bias of 1 moves by 1e-4 a step, a fortieth of bf16's place there: the copy sums them up."""
    parameter = nn.Parameter(torch.ones(16))
    optimizer = Adam8([parameter], lr=1e-4, weight_decay=0.0)
    for _ in range(100):
        parameter.grad = torch.ones(16, dtype=torch.bfloat16)
        optimizer.step()
    torch.testing.assert_close(optimizer.state[parameter]["master"], torch.full((16,), 0.99), rtol=1e-5, atol=0)
    assert torch.equal(parameter.detach(), bits.round_bf16(torch.full((16,), 0.99)))
