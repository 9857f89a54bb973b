import json
import re
from pathlib import Path

import pytest
import torch

from lowvram_db.dreambooth import run_dreambooth
from lowvram_db.errors import DoesNotFit
from lowvram_db.plan import make_plan
from lowvram_db.plan.meter import Meter
from lowvram_db.run import Run


def test_every_phase_of_a_run_is_measured_beside_its_prediction(make_config, capfd):
    run = run_dreambooth(make_config(train={"steps": 3}, sample={"every": 2}))
    plan = json.loads(run.plan.read_text())
    assert [phase["name"] for phase in plan["phases"]] == [
        "class images, denoising", "class images, decoding", "text encoding", "latent encoding",
        "first step", "steady step", "sampling on the way", "saving", "sampling, denoising", "sampling, decoding",
    ]  # fmt: skip
    err = capfd.readouterr().err
    for phase in plan["phases"]:
        assert phase["measured_bytes"] > 2**20 and phase["peak_bytes"] > 0, phase["name"]
        assert err.count(f"\n{phase['name']}: predicted ") == 1
    said = "the whole process has reached" in err
    assert said != torch.cuda.is_available(), "on a CPU nothing else can be measured, and it says so"


def test_on_a_card_a_prediction_stands_beside_what_the_allocator_gave_out(make_config, monkeypatch, capfd):
    """Encoding is predicted for one photo; the encoder takes as many as there is room for, and that is no mistake."""
    monkeypatch.setattr("lowvram_db.plan.meter.reset_peak", lambda device: None)
    monkeypatch.setattr("lowvram_db.plan.meter.peak_bytes", lambda device: 5 * 2**30)
    config = make_config()
    with Meter(make_plan(config, None), Run.of(config), torch.device("cuda")) as meter:
        for phase in ("latent encoding", "first step"):
            meter.begins(phase)
    said = capfd.readouterr().err
    for words in (
        r"\nlatent encoding: predicted at least 0\.\d\d GiB, measured 5\.00 GiB \(it makes batches of what is free\)\n",
        r"\nfirst step: predicted 0\.\d\d GiB, measured 5\.00 GiB\n",
    ):
        assert re.search(words, f"\n{said}"), said


def test_a_run_that_does_not_fit_ends_before_it_draws_or_trains(make_config):
    config = make_config(memory={"vram": "100MiB"})
    with pytest.raises(DoesNotFit, match=r"does not fit 0\.10 GiB: at the least 0\.\d\d GiB"):
        run_dreambooth(config)
    assert not list(Path(config.output.dir).rglob("*.png"))


def test_a_run_takes_the_strategy_of_its_plan(make_config, capfd):
    run = run_dreambooth(make_config(memory={"vram": "8GiB"}))
    assert json.loads(run.plan.read_text())["strategy"]["name"] == "no checkpointing"
    assert "plan: peak " in capfd.readouterr().err
