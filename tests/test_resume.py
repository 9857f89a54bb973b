"""Exact resume: N steps straight, and N steps with kills and Ctrl-C on the way, end in the same bits."""

import json
import multiprocessing
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from lowvram_db import dreambooth
from lowvram_db.demo.miniature import write_pipeline, write_sdxl
from lowvram_db.dreambooth import run_dreambooth
from lowvram_db.errors import Interrupted, UserError
from lowvram_db.families import open_blank
from lowvram_db.memory.overheads import MARGIN
from lowvram_db.plan.choose import choose
from lowvram_db.run import Run
from lowvram_db.train.checkpoint import latest

STEPS = 12


@pytest.fixture(scope="module")
def processes():
    """Child processes that start in a moment: the libraries are imported once, by the server they are forked from."""
    if torch.cuda.is_available():  # which an import has begun to use: no child of that process can
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lowvram_db.dreambooth", "diffusers.pipelines.stable_diffusion"])
    return context


@pytest.fixture
def config_of(make_config):
    def make(name, optimizer, text_encoder=None, **train):
        return make_config(
            text_encoder=text_encoder or {},
            prior={"count": 4, "batch": 1},
            train={"steps": STEPS, "schedule": "cosine", "warmup": 3, "lr": 1e-3} | train,
            optimizer={"name": optimizer},
            checkpoint={"every": 1},
            output={"name": name},
        )

    return make


@pytest.fixture(scope="module")
def _straight_runs():
    return {}


@pytest.fixture
def straight_run(config_of, _straight_runs):
    """A run that was never stopped, to compare with; made once for each optimizer."""

    def run(optimizer):
        if optimizer not in _straight_runs:
            _straight_runs[optimizer] = run_dreambooth(config_of("straight", optimizer))
        return _straight_runs[optimizer]

    return run


def command_of(*words):
    return [sys.executable, "-c", "from lowvram_db.cli import main; main()", *map(str, words)]


def step_of(run):
    last = latest(run.checkpoints)
    return int(last.name.removeprefix("step-")) if last else 0


def assert_same_result(straight, resumed):
    files = sorted(path.relative_to(straight.model) for path in straight.model.rglob("*.safetensors"))
    files_of_state = [straight.checkpoint(STEPS) / name for name in ("unet.safetensors", "optimizer.safetensors")]
    pairs = [(straight.model / file, resumed.model / file) for file in files]
    pairs += [(file, resumed.checkpoint(STEPS) / file.name) for file in files_of_state]
    assert len(pairs) >= 5
    for one, other in pairs:
        wanted, got = load_file(one), load_file(other)
        assert wanted.keys() == got.keys()
        assert all(torch.equal(tensor, got[name]) for name, tensor in wanted.items()), one.name
    assert straight.sample_grid(STEPS).read_bytes() == resumed.sample_grid(STEPS).read_bytes()
    losses = [
        [json.loads(line)["loss"] for line in run.metrics.read_text().splitlines()] for run in (straight, resumed)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS


@pytest.mark.parametrize("optimizer", ["adam8", pytest.param("bnb-adam8", marks=pytest.mark.slow)])
def test_kill_9_anywhere(config_of, straight_run, processes, optimizer):
    """Killed at a random instant of each stage, with gradients kept until the step and without: class images
    and caches, early and late steps, the last pictures."""
    straight = straight_run(optimizer)
    config = config_of("killed", optimizer)
    killed, chance = Run.of(config), random.Random(1)
    stages = []
    for step in (0, 1, 5, STEPS):
        process = processes.Process(target=run_dreambooth, args=(config,))
        process.start()
        while step_of(killed) < step:
            assert process.is_alive()
            time.sleep(0.005)
        process.join(chance.uniform(0, 0.3 if step else 1.0))
        process.kill()
        process.join()
        stages.append(step_of(killed))
    assert stages == sorted(stages), "a kill cost a finished checkpoint"
    assert stages[0] < 5 <= stages[2], f"only killed after the steps {stages}"
    assert_same_result(straight, run_dreambooth(config))


def test_kill_9_in_the_middle_of_saving(config_of, straight_run, processes):
    straight = straight_run("adamw")
    config = config_of("killed", "adamw")
    killed = Run.of(config)
    process = processes.Process(target=run_dreambooth, args=(config,))
    process.start()
    while not (latest(killed.checkpoints) and list(killed.checkpoints.glob(".step-*.partial-*"))):
        assert process.is_alive()
        time.sleep(0.0005)
    process.kill()
    process.join()
    assert_same_result(straight, run_dreambooth(config))
    assert not list(killed.checkpoints.glob(".*"))


def test_ctrl_c_saves_says_where_and_goes_on_exactly(config_of, straight_run, tmp_path):
    """The real command, in a process of its own, as a terminal would interrupt it."""
    straight = straight_run("adamw")
    config = config_of("stopped", "adamw")
    config = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"every": 0})})
    stopped, toml = Run.of(config), tmp_path / "stopped.toml"
    toml.write_text(config.to_toml(), encoding="utf-8")
    with subprocess.Popen(command_of("train", toml), stderr=subprocess.PIPE, text=True) as process:
        while not (stopped.metrics.exists() and stopped.metrics.read_text()):
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        message = process.communicate()[1].splitlines()[-1]
    assert process.returncode == 130
    saved = latest(stopped.checkpoints)
    assert message.endswith(f"saved {saved}; the same command goes on from there")
    assert "Traceback" not in message
    assert_same_result(straight, run_dreambooth(config))


def test_streamed_killed_and_interrupted_it_ends_as_if_state_had_never_left_the_card(
    config_of, straight_run, processes, miniature, tmp_path
):
    """In half, killed with -9 in the middle of a step; in whole, stopped by Ctrl-C; and then not at all."""
    straight = straight_run("adam8")
    rungs = choose(config_of("explained", "adam8"), open_blank(miniature), 2**40, True).rungs

    def config(eighths):
        peak = next(rung.peak_bytes for rung in rungs if rung.strategy.streamed == eighths)
        vram = {"vram": f"{int(peak * (1 + MARGIN) / 2**10) + 1}KiB"} if eighths else {}
        settings = config_of("killed", "adam8")
        return settings.model_copy(update={"memory": settings.memory.model_copy(update=vram)})

    def planned_for():
        return json.loads(run.plan.read_text())["strategy"]["streamed"]

    run, toml = Run.of(config(0)), tmp_path / "stopped.toml"
    process = processes.Process(target=run_dreambooth, args=(config(4),))
    process.start()
    while step_of(run) < 3:
        assert process.is_alive()
        time.sleep(0.005)
    process.kill()
    process.join()
    assert planned_for() == 4 and step_of(run) < STEPS - 2
    toml.write_text(config(8).to_toml(), encoding="utf-8")
    with subprocess.Popen(command_of("train", toml), stderr=subprocess.PIPE, text=True) as process:
        while step_of(run) < 6:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        assert "the same command goes on from there" in process.communicate()[1].splitlines()[-1]
    assert planned_for() == 8 and step_of(run) < STEPS
    assert_same_result(straight, run_dreambooth(config(0)))


@pytest.mark.slow
def test_with_weights_in_ram_a_run_ends_as_without(config_of, straight_run, monkeypatch):
    """Stopped halfway, which is a checkpoint's, and with pictures and validation on the way, which only read."""
    straight, whole = straight_run("adam8"), dreambooth.make_plan

    def planned(config, budget):
        plan = whole(config, budget)
        return replace(plan, strategy=replace(plan.strategy, streamed=8, weights=8))

    monkeypatch.setattr(dreambooth, "make_plan", planned)
    config = config_of("streamed", "adam8", validate_every=5)
    config = config.model_copy(update={"sample": config.sample.model_copy(update={"every": 5})})

    def stop(*_):
        raise Interrupted("here")

    with monkeypatch.context() as stopping, pytest.raises(Interrupted):
        stopping.setattr("lowvram_db.train.loop._checkpoint_due", lambda settings, step, _: step < 6 or stop())
        run_dreambooth(config)
    run = run_dreambooth(config)
    assert json.loads(run.plan.read_text())["strategy"]["weights"]
    assert run.sample_grid(5).exists() and "validation_subject" in run.metrics.read_text()
    losses = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in losses if "loss" in line))
    assert_same_result(straight, run)


def test_more_steps_go_on_and_keep_the_first_model(config_of):
    config = config_of("longer", "adamw", schedule="constant", warmup=0, steps=4)
    first = run_dreambooth(config)
    before = load_file(first.model / "unet" / "diffusion_pytorch_model.safetensors")
    longer = config_of("longer", "adamw", schedule="constant", warmup=0, steps=6)
    longer = longer.model_copy(update={"sample": longer.sample.model_copy(update={"every": 1})})
    run = run_dreambooth(longer)
    assert run.sample_grid(5).exists(), "pictures on the way may be asked for later"
    kept = load_file(run.folder / "model-before-step-000006" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in before.items())
    after = load_file(run.model / "unet" / "diffusion_pytorch_model.safetensors")
    assert not all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert run.sample_grid(4).exists()
    assert run.sample_grid(6).exists()


def test_fewer_steps_than_were_trained_are_refused(config_of):
    run_dreambooth(config_of("short", "adamw", steps=4))
    with pytest.raises(UserError, match=r"train\.steps: is 3, but .*step-000004 has been trained for 4 already"):
        run_dreambooth(config_of("short", "adamw", steps=3))


def test_a_checkpoint_of_another_run_starts_a_branch(config_of, straight_run):
    straight = straight_run("adamw")
    trunk = config_of("trunk", "adamw")
    trunk = trunk.model_copy(update={"checkpoint": trunk.checkpoint.model_copy(update={"keep": STEPS})})
    middle = run_dreambooth(trunk).checkpoint(5)
    branch = run_dreambooth(config_of("branch", "adamw"), resume=str(middle))
    one = load_file(straight.model / "unet" / "diffusion_pytorch_model.safetensors")
    other = load_file(branch.model / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.slow
def test_text_encoders_resume_too_and_where_they_stop(config_of, processes):
    """Killed with -9 while they are trained, and soon after the checkpoint of their last step."""
    text = {"train": True, "stop": 5}
    straight = run_dreambooth(config_of("straight", "bnb-adam8", text))
    config = config_of("killed", "bnb-adam8", text)
    killed = Run.of(config)
    for step in (1, 5):
        process = processes.Process(target=run_dreambooth, args=(config,))
        process.start()
        while step_of(killed) < step:
            time.sleep(0.005)
            assert process.is_alive()
        process.kill()
        process.join()
    assert_same_result(straight, run_dreambooth(config))


STAGES = {
    "SD 1, bnb-adam8": (write_pipeline, {"optimizer": {"name": "bnb-adam8"}}),
    "SDXL, adam8 with residuals, average": (
        write_sdxl,
        {"train": {"ema": 0.9}, "precision": {"compute": "bf16", "weights": "bf16+residual"}},
    ),
}


@pytest.mark.parametrize("name", [pytest.param("SD 1, bnb-adam8", marks=pytest.mark.slow), *list(STAGES)[1:]])
def test_before_at_and_after_the_text_encoders_stop_resume_is_exact(make_config, tmp_path, monkeypatch, name):
    write, sections = STAGES[name]
    write(tmp_path / "model")

    def config(name):
        train = {"steps": 4, "schedule": "cosine", "warmup": 1, "lr": 1e-3, **sections.get("train", {})}
        return make_config(
            model={"name": str(tmp_path / "model")},
            text_encoder={"train": True, "stop": 2},
            checkpoint={"every": 1, "keep": 9},
            cache={"dir": str(tmp_path / "cache")},
            prior={"enabled": False},
            sample={"prompts": ["a photo of a {identifier} {class}"]},
            output={"name": name},
            **{**sections, "train": train},
        )

    def files(run):
        found = sorted([*run.model.rglob("*.safetensors"), *run.checkpoint(4).glob("*.safetensors")])
        return {path.relative_to(run.folder): path.read_bytes() for path in [*found, run.sample_grid(4)]}

    straight = run_dreambooth(config("straight"))
    wanted = files(straight)
    assert ("ema.safetensors" in {path.name for path in wanted}) == ("train" in sections)
    for step in (1, 2, 3):
        branch = run_dreambooth(config(f"branch-{step}"), resume=str(straight.checkpoint(step)))
        assert files(branch) == wanted, step

    def stop(*_):
        raise SystemExit("between the last step of the text encoders and the next checkpoint")

    monkeypatch.setattr("lowvram_db.train.loop.Trainer.restore", stop)
    with pytest.raises(SystemExit):
        run_dreambooth(config("stopped"))
    monkeypatch.undo()
    assert step_of(Run.of(config("stopped"))) == 2
    assert files(run_dreambooth(config("stopped"))) == wanted
