import bitsandbytes
import pytest
import torch

from lowvram_db import cli
from lowvram_db.errors import UserError
from lowvram_db.kernels import launch
from lowvram_db.sections import OptimizerConfig
from lowvram_db.train.optimizer import FirstStepCheck, build, that_runs


@pytest.fixture
def parameters():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(128, 64)), torch.nn.Parameter(torch.randn(64))]


def grouped(parameters, lr):
    return [{"params": [(f"p{place}", parameter) for place, parameter in enumerate(parameters)], "lr": lr}]


def one_step(optimizer, parameters):
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "bnb-adam8", "adam8"])
def test_settings_reach_the_optimizer(parameters, name):
    settings = OptimizerConfig(name=name, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.05)
    group = build(settings, grouped(parameters, 3e-4)).param_groups[0]
    assert (group["lr"], tuple(group["betas"]), group["eps"], group["weight_decay"]) == (3e-4, (0.8, 0.9), 1e-6, 0.05)


@pytest.mark.parametrize(("name", "tolerance"), [("adamw", 1e-6), ("bnb-adam8", 2e-5), ("adam8", 3e-5)])
def test_the_first_step_is_adamws(parameters, name, tolerance):
    """After one step from zero state AdamW's update is lr * sign(g) plus decay. The 8-bit ones round; ours also takes
    off at once what its rounding would go on to do."""
    before = [parameter.detach().clone() for parameter in parameters]
    settings = OptimizerConfig(name=name)
    optimizer = build(settings, grouped(parameters, 1e-3))
    check = FirstStepCheck(settings, parameters, optimizer)
    one_step(optimizer, parameters)
    check.verify()
    for parameter, old in zip(parameters, before, strict=True):
        wanted = old * (1 - 1e-3 * 0.01) - 1e-3 * parameter.grad.sign()
        torch.testing.assert_close(parameter.detach(), wanted, atol=tolerance, rtol=0)


def test_bitsandbytes_state_is_8_bit(parameters):
    optimizer = build(OptimizerConfig(name="bnb-adam8"), grouped(parameters, 1e-3))
    one_step(optimizer, parameters)
    large, small = (optimizer.state[parameter] for parameter in parameters)
    assert (large["state1"].dtype, large["state2"].dtype) == (torch.uint8, torch.uint8)
    assert small["state1"].dtype == torch.float32, "below 4096 elements the state stays exact"


def test_weights_that_do_not_move_are_noticed(parameters):
    settings = OptimizerConfig(name="adamw")
    optimizer = build(settings, grouped(parameters, 1e-30))
    check = FirstStepCheck(settings, parameters, optimizer)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
        optimizer.param_groups[0]["weight_decay"] = 0.0
    optimizer.step()
    with pytest.raises(UserError, match=r"optimizer\.name: adamw did not change any weight"):
        check.verify()


def test_state_that_is_not_8_bit_is_noticed(parameters):
    """What older bitsandbytes did to callers whose arguments it bound wrongly."""
    settings = OptimizerConfig(name="bnb-adam8")
    optimizer = bitsandbytes.optim.AdamW(parameters, lr=1e-3)
    check = FirstStepCheck(settings, parameters, optimizer)
    one_step(optimizer, parameters)
    with pytest.raises(UserError, match=r"keeps torch\.float32 state where 8 bits were asked for"):
        check.verify()


@pytest.fixture
def no_triton(monkeypatch):
    """A GPU on which no kernel compiles."""
    monkeypatch.setattr(launch, "problem", lambda device: "RuntimeError: Failed to find C compiler")
    monkeypatch.setattr(launch, "mend", lambda: "apt install gcc")
    return torch.device("cuda", 0)


def test_without_triton_a_gpu_gets_bitsandbytes_adam_and_says_so(make_config, no_triton, capfd):
    config = that_runs(make_config(precision={"compute": "bf16"}), no_triton)
    assert (config.optimizer.name, config.weights, config.kernels) == ("bnb-adam8", "fp32", "torch")
    said = capfd.readouterr().err
    assert "Failed to find C compiler" in said and "bnb-adam8 and float32 weights" in said and "apt install gcc" in said
    assert that_runs(config, no_triton) == config and not capfd.readouterr().err, "once"


@pytest.mark.parametrize(
    "asked",
    [
        {"optimizer": {"name": "adam8"}},
        {"precision": {"compute": "bf16", "weights": "bf16+residual"}},
        {"precision": {"compute": "fp16", "weights": "fp16"}},
        {"kernels": "triton"},
    ],
)
def test_without_triton_adam8_that_was_asked_for_is_refused_with_the_mend(make_config, no_triton, asked):
    config = make_config().model_validate(make_config().model_dump(exclude_unset=True) | asked)
    with pytest.raises(UserError) as refused:
        that_runs(config, no_triton)
    said = str(refused.value)
    assert said.startswith("optimizer.name: adam8 needs Triton") and "apt install gcc, or go on with" in said
    assert ("without precision.weights" in said) == ("precision" in asked) and "\n" not in said


@pytest.mark.parametrize("other", [{"optimizer": {"name": "adamw"}}, {"kernels": "torch"}])
def test_what_needs_no_triton_stays(make_config, no_triton, other, capfd):
    config = make_config().model_validate(make_config().model_dump(exclude_unset=True) | other)
    assert that_runs(config, no_triton) is config
    assert that_runs(make_config(), torch.device("cpu")) == make_config()
    assert not capfd.readouterr().err


def test_a_plan_is_made_for_the_optimizer_that_will_run(make_config, no_triton, monkeypatch):
    monkeypatch.setattr("lowvram_db.memory.device.pick_device", lambda: no_triton)
    monkeypatch.setattr("shutil.which", lambda program: None)
    assert cli._as_trained_here(make_config()).optimizer.name == "adam8", "where there is no card"
    monkeypatch.setattr("shutil.which", lambda program: program)
    assert cli._as_trained_here(make_config()).optimizer.name == "bnb-adam8"
