"""Out of memory in a step: one rung down, the same step again, nothing lost. The error is injected, on a CPU."""

import json
from dataclasses import replace

import pytest
import torch

from lowvram_db.errors import DoesNotFit
from lowvram_db.run import Run
from lowvram_db.train.loop import train
from lowvram_db.train.strategy import Strategy, ladder

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB."
FASTEST = Strategy(0, 5)


def start(make_trainer, config):
    trainer = make_trainer(config)
    trainer.use(FASTEST)
    return trainer


def weights(trainer):
    """Of small tensors Adam8's exact copy, where it has one."""
    state = trainer.optimizer.state
    return {n: state.get(p, {}).get("master", p).detach().clone() for n, p in trainer.denoiser.named_parameters()}


def fail_once(trainer, at_step, name=None, error=None):
    """Raise in the forward pass of a step, or in backward when the gradient of parameter `name` exists."""
    failed = []

    def fail(*_):
        if trainer.step == at_step and not failed:
            failed.append(True)
            raise error or torch.OutOfMemoryError(FULL)

    if name is None:
        trainer.denoiser.conv_out.register_forward_pre_hook(fail)
    else:
        dict(trainer.denoiser.named_parameters())[name].register_hook(fail)
    return failed


OPTIMIZERS = {
    "adam8": {"precision": {"compute": "bf16"}},
    "adamw": {"optimizer": {"name": "adamw"}},
    "bnb-adam8": {"optimizer": {"name": "bnb-adam8"}},
}


@pytest.mark.parametrize("where", [None, "conv_in.weight"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_before_a_weight_has_moved_the_repeated_step_is_the_same(make_config, make_trainer, optimizer, where, capfd):
    """In the forward pass; and, with gradients that are kept for step(), at the very end of backward too."""
    if optimizer == "adam8" and where:
        pytest.skip("has moved nearly every weight by then: the next test")
    config = make_config(**OPTIMIZERS[optimizer])
    straight, broken = start(make_trainer, config), start(make_trainer, config)
    failed = fail_once(broken, at_step=1, name=where)
    losses = [[trainer.train_step().read().total for _ in range(3)] for trainer in (straight, broken)]
    assert failed
    assert losses[0] == losses[1]
    assert all(torch.equal(tensor, weights(broken)[name]) for name, tensor in weights(straight).items())
    assert (straight.strategy, broken.strategy) == (FASTEST, Strategy(1, 5))
    err = capfd.readouterr().err
    assert f"step 2: out of memory ({FULL}). Repeated, and on from here, with checkpointing 1 of 5 blocks" in err
    assert "had made this step already" not in err


def test_in_the_middle_of_backward_every_weight_still_makes_the_step_once(make_config, make_trainer, capfd):
    # At DreamBooth's learning rate: what the rest's gradients see of the steps made already is small.
    config = make_config(precision={"compute": "bf16"}, train={"lr": 2e-6})
    straight, broken = start(make_trainer, config), start(make_trainer, config)
    before, moved = weights(broken), []
    broken.denoiser.mid_block.resnets[0].conv1.weight.register_hook(
        lambda _: None if moved else moved.extend(n for n, w in weights(broken).items() if not w.equal(before[n]))
    )
    fail_once(broken, at_step=0, name="mid_block.resnets.0.conv1.weight")
    for trainer in (straight, broken):
        trainer.train_step()
    wanted, got = weights(straight), weights(broken)
    large = [name for name in moved if wanted[name].numel() >= 4096]
    assert large and len(large) < len(wanted)
    for name in large:  # they keep what they did: to the bit the step of an undisturbed run
        assert torch.equal(got[name], wanted[name]), name
    assert broken.optimizer.calls == straight.optimizer.calls == 1
    for name, old in before.items():  # once: Adam's first step moves a weight by lr, a second would by as much again
        step, undisturbed = (w[name].float() - old.float() for w in (got, wanted))
        assert not torch.equal(got[name], old), name
        assert step.norm().item() == pytest.approx(undisturbed.norm().item(), rel=0.1), name
    # Adam's first step forgets a gradient's scale, its state does not. All of it together: that of a single tensor
    # scatters, for bf16 gradients do where other weights have moved.
    m, undisturbed = (
        torch.cat([state["exp_avg"].flatten() for state in trainer.optimizer.state.values() if "exp_avg" in state])
        for trainer in (broken, straight)
    )
    assert m.norm().item() == pytest.approx(undisturbed.norm().item(), rel=0.1)
    said = capfd.readouterr().err
    assert f"{len(set(large))} of {len(wanted)} tensors had made this step already and keep it" in said
    broken.train_step()


def test_every_step_is_logged_once_and_the_run_ends(make_config, make_trainer):
    config = make_config(precision={"compute": "bf16"})
    trainer, run = start(make_trainer, config), Run.of(config)
    run.folder.mkdir(parents=True)
    fail_once(trainer, at_step=2)
    train(trainer, run, sample=lambda path: None)
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [1, 2, 3, 4]


@pytest.mark.parametrize("words", ["Triton Error [CUDA]: out of memory", "FIND was unable to find an engine"])
def test_by_other_names_it_is_the_same(make_config, make_trainer, capfd, words):
    trainer = start(make_trainer, make_config(optimizer={"name": "adamw"}))
    fail_once(trainer, at_step=0, error=RuntimeError(words))
    trainer.train_step()
    assert trainer.strategy == Strategy(1, 5)
    assert f"out of memory ({words})" in capfd.readouterr().err


@pytest.mark.parametrize("optimizer", ["adamw", "bnb-adam8"])
def test_the_first_step_finds_its_state_made(make_config, make_trainer, optimizer):
    """Else it would be made in the middle of a step, where a full card leaves some weights moved and some not."""
    trainer = make_trainer(make_config(optimizer={"name": optimizer}))
    before = {p: dict(trainer.optimizer.state[p]) for p in trainer.parameters}
    assert all(before.values())
    trainer.train_step()
    for p in trainer.parameters:
        made = {k: v for k, v in trainer.optimizer.state[p].items() if isinstance(v, torch.Tensor)}
        assert made.keys() == {k for k, v in before[p].items() if isinstance(v, torch.Tensor)}
        assert all(made[k].data_ptr() == before[p][k].data_ptr() for k in made)


def test_rung_by_rung_down_to_the_end_of_the_ladder(make_config, make_trainer):
    """What it has of state in RAM comes at once."""
    config, tried = make_config(), []
    trainer = start(make_trainer, config)

    def full(*_):
        tried.append(trainer.strategy)
        raise torch.OutOfMemoryError(FULL)

    trainer.denoiser.conv_out.register_forward_pre_hook(full)
    with pytest.raises(DoesNotFit, match=r"step 1 does not fit \(CUDA out of memory.*finished work is kept"):
        trainer.train_step()
    assert tried == [*(Strategy(count, 5) for count in range(6)), Strategy(5, 5, streamed=8)]


def test_a_batch_in_parts_gives_the_gradients_of_the_whole(make_config, make_trainer):
    config = make_config(train={"batch": 2, "lr": 1e-3}, optimizer={"name": "adamw"}, prior={"weight": 0.7})
    whole, parts = make_trainer(config), make_trainer(config)
    whole.use(Strategy(0, 5)), parts.use(Strategy(0, 5, parts=4))
    losses = [trainer.backward(trainer.batches[0]) for trainer in (whole, parts)]
    torch.testing.assert_close(losses[0], losses[1])
    for one, other in zip(whole.parameters, parts.parameters, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-6)


def test_what_the_user_fixed_is_on_every_rung(make_config):
    fixed = {value: ladder(make_config(train={"gradient_checkpointing": value}), 4) for value in (True, False)}
    for value, count in ((True, 4), (False, 0)):
        rungs = [Strategy(count, 4, streamed=eighths) for eighths in range(9)]
        assert fixed[value] == [*rungs, *(replace(rungs[-1], weights=eighths) for eighths in range(1, 9))]
    free = ladder(make_config(), 4)
    assert [rung.checkpointed for rung in free if not rung.streamed] == [0, 1, 2, 3, 4]
    assert free[4:] == fixed[True]
    split = ladder(make_config(train={"batch": 4}, optimizer={"name": "adamw"}), 4)[5:]
    assert [(rung.checkpointed, rung.parts) for rung in split] == [(4, 2), (4, 4), (4, 8)]
