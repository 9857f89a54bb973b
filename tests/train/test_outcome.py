"""What a step asks of the host: nothing while it runs, and its numbers a step later."""

import json
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowvram_db.run import Run
from lowvram_db.train import learner
from lowvram_db.train.loop import train

NUMBERS_READ = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default}


class Counting(TorchDispatchMode):
    """How often each operation is called."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("compute", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["adam8", "adamw"])
@pytest.mark.parametrize("text_encoder", [False, True])
def test_no_number_is_read_from_the_device_in_a_step(make_config, make_trainer, optimizer, compute, text_encoder):
    config = make_config(
        optimizer={"name": optimizer}, precision={"compute": compute}, text_encoder={"train": text_encoder}
    )
    trainer = make_trainer(config)
    trainer.train_step()
    with Counting() as counting:
        outcome = trainer.train_step()
    assert counting.calls.total() > 500
    assert not NUMBERS_READ & counting.calls.keys()
    with Counting() as counting:
        outcome.read()
    assert counting.calls.total() < 3, "all numbers come in one piece"


def test_all_that_a_step_reads_is_sent_before_its_first_kernel(make_config, make_trainer, monkeypatch):
    trainer, order, sent, noisy = make_trainer(make_config()), [], learner.sent, learner.noisy_latents
    monkeypatch.setattr(learner, "sent", lambda *given: (order.append("sent"), sent(*given))[1])
    monkeypatch.setattr(learner, "noisy_latents", lambda *given: (order.append("kernel"), noisy(*given))[1])
    trainer.train_step()
    assert order == ["sent"] * 5 + ["kernel"]


def test_numbers_read_a_step_later_are_the_same(make_config, make_trainer):
    """Also across what settles them: saving, sampling and the end."""
    lines = []
    for lag in (0, 1):
        config = make_config(
            train={"steps": 6}, sample={"every": 3}, checkpoint={"every": 2}, output={"name": f"lag-{lag}"}
        )
        trainer, run = make_trainer(config), Run.of(config)
        run.folder.mkdir(parents=True)
        trainer.lag = lag
        train(trainer, run, sample=lambda path: None)
        lines.append([json.loads(line) for line in run.metrics.read_text().splitlines()])
    same = ("step", "loss", "instance_loss", "prior_loss", "lr")
    assert [[line[key] for key in same] for line in lines[0]] == [[line[key] for key in same] for line in lines[1]]
    assert [line["step"] for line in lines[1]] == [1, 2, 3, 4, 5, 6]


def test_with_a_lag_the_next_step_begins_before_the_last_is_read(make_config, make_trainer, monkeypatch):
    config = make_config(train={"steps": 4}, checkpoint={"every": 0})
    trainer, run = make_trainer(config), Run.of(config)
    run.folder.mkdir(parents=True)
    read, judge = [], trainer.judge
    monkeypatch.setattr(
        trainer, "judge", lambda step, numbers: (read.append((step, trainer.step)), judge(step, numbers))
    )
    trainer.lag = 1
    train(trainer, run, sample=lambda path: None)
    assert read == [(1, 2), (2, 3), (3, 4), (4, 4)]


def test_a_step_that_fails_leaves_the_one_before_in_the_log(make_config, make_trainer, monkeypatch):
    config = make_config(checkpoint={"every": 0})
    trainer, run = make_trainer(config), Run.of(config)
    run.folder.mkdir(parents=True)
    trainer.lag, update = 1, trainer.update
    monkeypatch.setattr(trainer, "update", lambda loss: 1 / 0 if trainer.step == 2 else update(loss))
    with pytest.raises(ZeroDivisionError):
        train(trainer, run, sample=lambda path: None)
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [1, 2]


def test_checkpointing_asks_for_no_generators_state(make_config, make_trainer, monkeypatch):
    trainer = make_trainer(make_config(text_encoder={"train": True}, train={"gradient_checkpointing": True}))
    monkeypatch.setattr(torch, "get_rng_state", lambda: pytest.fail("a generator's state was asked for"))
    trainer.train_step()
