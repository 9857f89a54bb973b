import pytest
import torch
from torch import nn

from lowvram_db.optim.adam8 import Adam8
from lowvram_db.optim.loss_scale import FIRST, GROWTH_INTERVAL, LossScale


def step(parameter, optimizer, scale, gradient):
    scale.scale((parameter.half().float() * gradient).sum()).backward()  # as fp16 arithmetic takes a gradient
    scale.step(optimizer)
    optimizer.zero_grad()
    scale.update()


def fp16(weights="fp16"):
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(64, 64))
    optimizer = Adam8([parameter], lr=1e-3, weights=weights)
    return parameter, optimizer, LossScale(optimizer, dynamic=True)


@pytest.mark.parametrize("weights", ["fp16", "fp32"])
def test_an_overflow_skips_the_whole_tensor_and_halves_the_scale(recwarn, weights):
    parameter, optimizer, scale = fp16(weights)
    before = parameter.detach().clone()
    gradient = torch.full((64, 64), 1e-3)
    gradient[0, 0] = 10.0  # times 65,536: beyond fp16
    step(parameter, optimizer, scale, gradient)
    assert torch.equal(before, parameter), "not the overflowing element alone"
    assert scale.get_scale() == FIRST / 2
    step(parameter, optimizer, scale, torch.full((64, 64), 1e-3))
    assert not torch.equal(before, parameter)
    assert scale.get_scale() == FIRST / 2


def test_faint_gradients_survive_fp16():
    """1e-8 is zero in fp16. Scaled it moves every weight by lr / 2, with Adam's eps of 1e-8 beside it."""
    parameter, optimizer, scale = fp16()
    before = parameter.detach().float()
    step(parameter, optimizer, scale, torch.full((64, 64), 1e-8))
    assert (before - parameter).mean().item() == pytest.approx(5e-4, rel=0.1)


def test_good_steps_double_the_scale_and_are_kept_in_checkpoints():
    parameter, optimizer, scale = fp16()
    scale.load_state_dict({"scale": 8.0, "good_steps": GROWTH_INTERVAL - 2, "growth_interval": GROWTH_INTERVAL})
    step(parameter, optimizer, scale, torch.ones(64, 64))
    assert scale.get_scale() == 8.0
    saved, again = scale.state_dict(), LossScale(optimizer, dynamic=True)
    again.load_state_dict(saved)
    step(parameter, optimizer, again, torch.ones(64, 64))
    assert again.get_scale() == 16.0


def test_bf16_and_float32_need_none():
    parameter = nn.Parameter(torch.randn(64, 64))
    optimizer = Adam8([parameter], weights="fp32")
    scale = LossScale(optimizer, dynamic=False)
    for _ in range(3):
        step(parameter, optimizer, scale, torch.ones(64, 64))
    assert scale.get_scale() == 1.0
    assert scale.state_dict() == {}
