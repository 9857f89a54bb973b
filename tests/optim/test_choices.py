import bitsandbytes
import pytest
import torch

from lowvram_db.config import OptimizerConfig
from lowvram_db.errors import UserError
from lowvram_db.optim.choices import FirstStepCheck, build


@pytest.fixture
def parameters():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(128, 64)), torch.nn.Parameter(torch.randn(64))]


def named(parameters):
    return [(f"p{place}", parameter) for place, parameter in enumerate(parameters)]


def one_step(optimizer, parameters):
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "bnb-adam8", "adam8"])
def test_settings_reach_the_optimizer(parameters, name):
    settings = OptimizerConfig(name=name, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.05)
    group = build(settings, named(parameters), 3e-4).param_groups[0]
    assert (group["lr"], tuple(group["betas"]), group["eps"], group["weight_decay"]) == (3e-4, (0.8, 0.9), 1e-6, 0.05)


@pytest.mark.parametrize(("name", "tolerance"), [("adamw", 1e-6), ("bnb-adam8", 2e-5), ("adam8", 3e-5)])
def test_the_first_step_is_adamws(parameters, name, tolerance):
    """After one step from zero state AdamW's update is lr * sign(g) plus decay. The 8-bit ones round; ours also takes
    off at once what its rounding would go on to do."""
    before = [parameter.detach().clone() for parameter in parameters]
    settings = OptimizerConfig(name=name)
    optimizer = build(settings, named(parameters), 1e-3)
    check = FirstStepCheck(settings, parameters)
    one_step(optimizer, parameters)
    check.verify(optimizer)
    for parameter, old in zip(parameters, before, strict=True):
        wanted = old * (1 - 1e-3 * 0.01) - 1e-3 * parameter.grad.sign()
        torch.testing.assert_close(parameter.detach(), wanted, atol=tolerance, rtol=0)


def test_bitsandbytes_state_is_8_bit(parameters):
    optimizer = build(OptimizerConfig(name="bnb-adam8"), named(parameters), 1e-3)
    one_step(optimizer, parameters)
    large, small = (optimizer.state[parameter] for parameter in parameters)
    assert (large["state1"].dtype, large["state2"].dtype) == (torch.uint8, torch.uint8)
    assert small["state1"].dtype == torch.float32, "below 4096 elements the state stays exact"


def test_weights_that_do_not_move_are_noticed(parameters):
    settings = OptimizerConfig(name="adamw")
    optimizer, check = build(settings, named(parameters), 1e-30), FirstStepCheck(settings, parameters)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
        optimizer.param_groups[0]["weight_decay"] = 0.0
    optimizer.step()
    with pytest.raises(UserError, match=r"optimizer\.name: adamw did not change any weight"):
        check.verify(optimizer)


def test_state_that_is_not_8_bit_is_noticed(parameters):
    """What older bitsandbytes did to callers whose arguments it bound wrongly."""
    settings = OptimizerConfig(name="bnb-adam8")
    optimizer, check = bitsandbytes.optim.AdamW(parameters, lr=1e-3), FirstStepCheck(settings, parameters)
    one_step(optimizer, parameters)
    with pytest.raises(UserError, match=r"keeps torch\.float32 state where 8 bits were asked for"):
        check.verify(optimizer)
