import errno
import json
from pathlib import Path

import pytest
import torch

from lowvram_db.errors import UserError
from lowvram_db.run import Run
from lowvram_db.train import checkpoint
from lowvram_db.train.saving import Saver

OPTIMIZERS = ["adamw", "bnb-adam8", "adam8"]


def same(trainer, other):
    pairs = zip(trainer.parameters, other.parameters, strict=True)
    return all(torch.equal(one, two) for one, two in pairs)


@pytest.mark.parametrize("compute", ["fp32", "fp16"])
@pytest.mark.parametrize("text_encoder", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resumed_equals_straight(make_config, make_trainer, tmp_path, optimizer, text_encoder, compute):
    config = make_config(
        train={"steps": 4, "schedule": "cosine", "warmup": 1, "lr": 1e-3},
        text_encoder={"train": text_encoder},
        precision={"compute": compute},
        optimizer={"name": optimizer},
    )
    straight = make_trainer(config)
    straight.scaler.set_growth_interval(1)  # or fp16's loss scale would stand still for 2000 steps
    for _ in range(2):
        straight.train_step()
    checkpoint.save(tmp_path / "step-000002", straight.contents())
    for _ in range(2):
        straight.train_step()

    resumed = make_trainer(config)
    resumed.restore(tmp_path / "step-000002")
    assert resumed.step == 2
    assert not same(straight, resumed)
    for _ in range(2):
        resumed.train_step()
    assert same(straight, resumed)
    assert resumed.scaler.state_dict() == straight.scaler.state_dict()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_saving_changes_nothing(make_config, make_trainer, tmp_path, optimizer):
    config = make_config(optimizer={"name": optimizer})
    one, other = make_trainer(config), make_trainer(config)
    for step in range(3):
        one.train_step()
        checkpoint.save(tmp_path / f"step-{step}", one.contents())
        other.train_step()
    assert same(one, other)


def test_only_safe_files(make_config, make_trainer, tmp_path):
    trainer = make_trainer(make_config())
    trainer.train_step()
    checkpoint.save(tmp_path / "step", trainer.contents())
    assert {path.suffix for path in (tmp_path / "step").iterdir()} == {".safetensors", ".json"}


def save_checkpoint(trainer, run):
    with Saver(run, trainer.config.checkpoint.keep, trainer.device) as saver:
        saver.save(trainer.contents())


@pytest.fixture
def saved(make_config, make_trainer):
    """A run with one good checkpoint at step 1, and its trainer."""
    config = make_config()
    trainer, run = make_trainer(config), Run.of(config)
    trainer.train_step()
    save_checkpoint(trainer, run)
    return trainer, run


def test_a_full_disk_keeps_the_last_good_checkpoint(saved, make_trainer, monkeypatch):
    trainer, run = saved
    trainer.train_step()

    def fills_up(path, *_, **__):
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", fills_up)
    with pytest.raises(UserError, match=r"step-000002: the disk is full .*the last good checkpoint is .*step-000001"):
        save_checkpoint(trainer, run)
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-000001"]
    monkeypatch.undo()
    make_trainer(trainer.config).restore(checkpoint.latest(run.checkpoints))


def test_old_checkpoints_go_only_after_the_new_one_is_there(saved, monkeypatch):
    trainer, run = saved
    for wanted in (["step-000002"], ["step-000003"]):
        trainer.train_step()
        save_checkpoint(trainer, run)
        assert [path.name for path in run.checkpoints.iterdir()] == wanted


@pytest.mark.parametrize("name", ["unet.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_checkpoint_is_named(saved, make_trainer, name, damage):
    trainer, run = saved
    file = checkpoint.latest(run.checkpoints) / name
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(UserError, match=r"step-000001: damaged \("):
        make_trainer(trainer.config).restore(run.checkpoint(1))


def test_another_format_is_refused(saved, make_trainer):
    trainer, run = saved
    file = checkpoint.latest(run.checkpoints) / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
    with pytest.raises(UserError, match="written by another version"):
        make_trainer(trainer.config).restore(checkpoint.latest(run.checkpoints))


def test_changed_settings_are_named_with_those_that_may_change(saved, make_config, make_trainer):
    _, run = saved
    changed = make_config(train={"lr": 5e-5, "steps": 9}, sample={"every": 1})
    with pytest.raises(UserError) as caught:
        make_trainer(changed).restore(checkpoint.latest(run.checkpoints))
    assert "train.lr (0.0001 -> 5e-05)" in str(caught.value)
    assert "train.steps (" not in str(caught.value)
    assert "These may change on resume: train.steps, sample.*" in str(caught.value)


def test_allowed_changes_resume(saved, make_config, make_trainer):
    _, run = saved
    changed = make_config(train={"steps": 9, "gradient_checkpointing": False}, sample={"every": 1})
    trainer = make_trainer(changed.model_copy(update={"attention": "sdpa"}))
    trainer.restore(checkpoint.latest(run.checkpoints))
    assert trainer.step == 1


def test_changed_photos_are_refused(saved, make_config, make_trainer, photos, tmp_path):
    _, run = saved
    fewer = tmp_path / "photos"
    fewer.mkdir()
    for photo in sorted(photos.iterdir())[:3]:
        (fewer / photo.name).write_bytes(photo.read_bytes())
    config = make_config()
    trainer = make_trainer(make_config(subject={"photos": str(fewer)}))
    trainer.config = config
    with pytest.raises(UserError, match="was trained on other photos or another model"):
        trainer.restore(checkpoint.latest(run.checkpoints))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what is mapped")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_leaves_its_checkpoint_alone(make_config, make_trainer, tmp_path, optimizer):
    """No file stays mapped: Windows would not delete it. And the state stays where it is, so that a graph finds it."""
    config = make_config(optimizer={"name": optimizer})
    trainer = make_trainer(config)
    trainer.train_step()
    checkpoint.save(tmp_path / "step-000001", trainer.contents())
    resumed = make_trainer(config)
    before = [tensor for held in resumed.optimizer.state.values() for tensor in held.values()]
    resumed.restore(tmp_path / "step-000001")
    assert "step-000001" not in Path("/proc/self/maps").read_text()
    after = [tensor for held in resumed.optimizer.state.values() for tensor in held.values()]
    assert all(one is other for one, other in zip(before, after, strict=True) if isinstance(one, torch.Tensor))


def test_another_optimizers_state_is_refused(saved, make_config, make_trainer):
    _, run = saved
    other = make_trainer(make_config(optimizer={"name": "adamw"}))
    state = checkpoint.read_state(run.checkpoint(1))
    with pytest.raises(UserError, match=r"step-000001: state of parameter 0 .*start a new run"):
        checkpoint.restore(run.checkpoint(1), state, other.trained, other.optimizer, {})
