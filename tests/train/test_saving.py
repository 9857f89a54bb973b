import signal
import threading

import pytest
import torch

from lowvram_db.errors import Interrupted, UserError
from lowvram_db.run import Run
from lowvram_db.train import checkpoint, loop, saving
from lowvram_db.train.loop import train


@pytest.fixture
def beside(monkeypatch):
    """Checkpoints are written beside training, as they are on a GPU."""
    monkeypatch.setattr(saving.Saver, "_can_copy", lambda *_: True)


@pytest.fixture
def start(make_config, make_trainer, beside):
    def start(**settings):
        config = make_config(**settings)
        trainer, run = make_trainer(config), Run.of(config)
        run.folder.mkdir(parents=True)
        return trainer, run

    return start


class SlowDisk:
    """Writes the checkpoint of one step only when it is told to."""

    def __init__(self, monkeypatch, step):
        self.waits, self.go_on, self.fails = threading.Event(), threading.Event(), None
        write = checkpoint.write_tensors

        def slow(path, tensors, **how):
            if f"step-{step:06d}" in str(path):
                self.waits.set()
                assert self.go_on.wait(60)
                if self.fails:
                    raise self.fails
            return write(path, tensors, **how)

        monkeypatch.setattr(checkpoint, "write_tensors", slow)


OPTIMIZERS = ["adamw", "bnb-adam8", "adam8"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_goes_on_while_a_checkpoint_is_written(start, monkeypatch, optimizer):
    """Which is of the step that it is named for, byte for byte what is written where nothing goes on; and the one
    before goes only when it is whole."""
    settings = {"checkpoint": {"every": 2, "keep": 1}, "optimizer": {"name": optimizer}, "train": {"steps": 6}}
    straight, own = start(**settings, output={"name": "straight"})
    for _ in range(4):
        straight.train_step()
    checkpoint.save(own.checkpoint(4), straight.contents())

    trainer, run = start(**settings)
    disk, seen = SlowDisk(monkeypatch, 4), []
    step = trainer.train_step

    def watched():
        loss = step()
        if trainer.step == 5:
            assert disk.waits.wait(60)
            seen.append(sorted(path.name for path in run.checkpoints.glob("step-*")))
            disk.go_on.set()
            trainer_saved.wait()
            seen.append(sorted(path.name for path in run.checkpoints.glob("step-*")))
            for file in own.checkpoint(4).glob("*.safetensors"):
                assert (run.checkpoint(4) / file.name).read_bytes() == file.read_bytes()
        return loss

    made = saving.Saver.__enter__

    def enter(saver):
        nonlocal trainer_saved
        trainer_saved = saver
        return made(saver)

    trainer_saved = None
    monkeypatch.setattr(saving.Saver, "__enter__", enter)
    monkeypatch.setattr(trainer, "train_step", watched)
    train(trainer, run, sample=lambda path: None)
    assert seen == [["step-000002"], ["step-000004"]]
    assert list(checkpoint.steps(run.checkpoints)) == [6]


def test_a_checkpoint_that_fails_beside_training_ends_it_with_the_last_good_one_named(start, monkeypatch):
    trainer, run = start(checkpoint={"every": 1}, train={"steps": 9})
    disk = SlowDisk(monkeypatch, 2)
    disk.fails = OSError(28, "No space left on device")
    disk.go_on.set()
    with pytest.raises(UserError, match=r"step-000002: the disk is full .*the last good checkpoint is .*step-000001$"):
        train(trainer, run, sample=lambda path: None)
    assert list(checkpoint.steps(run.checkpoints)) == [1]
    assert trainer.step == 3, "at the next checkpoint"


@pytest.mark.parametrize("ends", ["an error", "an error and a full disk", "Ctrl-C"])
def test_training_that_ends_meanwhile_waits_for_the_checkpoint(start, monkeypatch, capfd, ends):
    trainer, run = start(checkpoint={"every": 2}, train={"steps": 9})
    disk = SlowDisk(monkeypatch, 2)
    disk.fails = OSError(28, "No space left on device") if "disk" in ends else None
    step = trainer.train_step

    def ending():
        if trainer.step == 2:
            threading.Timer(0.2, disk.go_on.set).start()
            if "error" in ends:
                raise UserError("the end")
            signal.raise_signal(signal.SIGINT)
        return step()

    monkeypatch.setattr(trainer, "train_step", ending)
    with pytest.raises(UserError if "error" in ends else Interrupted, match=r"^(the end|stopped after step 3 of 9)"):
        train(trainer, run, sample=lambda path: None)
    wanted = {"an error": [2], "an error and a full disk": [], "Ctrl-C": [3]}
    assert list(checkpoint.steps(run.checkpoints)) == wanted[ends]
    assert ("step-000002: the disk is full" in capfd.readouterr().err) == ("disk" in ends)


def test_without_memory_for_the_copy_it_is_written_at_once(make_config, make_trainer, monkeypatch):
    trainer = make_trainer(make_config())
    files = trainer.contents().files
    size = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    run = Run.of(trainer.config)
    for device, spare, wanted in (("cuda", 0, True), ("cuda", -1, False), ("cpu", 2**40, False)):
        free = type("", (), {"available": size + 2**30 + spare})
        monkeypatch.setattr(saving.psutil, "virtual_memory", lambda free=free: free)
        assert saving.Saver(run, 1, torch.device(device))._can_copy(files) == wanted


@pytest.mark.parametrize(("every", "wanted"), [(None, [2, 4]), (3, [3, 6]), (0, [])])
def test_due_by_minutes_unless_by_steps(make_config, every, wanted):
    settings = make_config(checkpoint={"every": every, "minutes": 2}).checkpoint
    due = [step for step in range(1, 7) if loop._checkpoint_due(settings, step, seconds=120 if step in (2, 4) else 119)]
    assert due == wanted
