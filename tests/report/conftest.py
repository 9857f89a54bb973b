"""Runs as they are found on disks, made up in a moment: no model is trained for them."""

import json

import numpy as np
import pytest
from PIL import Image

from lowvram_db.sheet import Grid, save_sheet

PROMPTS = ["a photo of a pkblz jellyfish", "a photo of a jellyfish"]


def picture(seed, side):
    """Smooth colours, other ones for every seed."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def grid(step, prompts=PROMPTS, guidance=(2.5, 7.0), seeds=2, side=64):
    columns = len(guidance) * seeds
    rows = [
        [picture(1000 * step + 10 * row + column, side) for column in range(columns)] for row in range(len(prompts))
    ]
    return Grid(list(prompts), list(guidance), seeds, 25, rows)


def metrics_line(step):
    values = {"loss": 0.3, "instance_loss": 0.2 + 0.1 / (1 + step), "prior_loss": 0.1, "lr": 2e-6}
    return json.dumps({"step": step, **values, "seconds": 0.5, "peak_bytes": 2**30 + step})


def interval(mean):
    return {"mean": mean, "low": mean - 0.05, "high": mean + 0.05}


def evaluation():
    scores = {"subject": interval(0.7), "prompt": interval(0.3), "class_likeness": None, "memorised": interval(0.1)}
    kept = [
        {"step": step, "path": f"checkpoints/step-{step:06d}", "scores": scores, "findings": []} for step in (20, 40)
    ]
    return {
        "format": 1, "key": "k", "backbone": "dinov2", "compared_with": "photos", "photos": 3,
        "photos_similarity": 0.7, "settings": {}, "base": scores, "checkpoints": kept,
        "recommended": {"step": 20, "path": "checkpoints/step-000020", "reason": "As near, and drifts less."},
    }  # fmt: skip


def plan():
    parts = ("weights", "optimizer", "gradients", "activations", "workspace", "context")
    phases = [
        {"name": name, "components": dict.fromkeys(parts, 2**28), "peak_bytes": 6 * 2**28, "measured_bytes": measured}
        for name, measured in (("first step", 5 * 2**28), ("steady step", None))
    ]
    return {"fits": True, "budget_bytes": 8 * 2**30, "strategy": {"name": "no checkpointing"}, "phases": phases}


def identifier():
    pieces = [{"text": "pkblz", "number": 48136, "rarity": 0.97, "near": ["blz", "pk", "pkm"], "is_word": False}]
    told = [{"part": "text_encoder", "pieces": pieces, "beside_class": False}]
    return {"word": "pkblz", "said": "identifier pkblz: one token (48136)", "encoders": told}


@pytest.fixture
def make_run(tmp_path, photos, make_config):
    """A run's folder by the names of settings to be other than usual; everything in it is whole."""

    def make(name="jelly", steps=(0, 20, 40), prompts=PROMPTS, guidance=(2.5, 7.0), side=64, **sections):
        folder = tmp_path / "runs" / name
        (folder / "samples").mkdir(parents=True)
        (folder / "model").mkdir()
        (folder / "checkpoints" / f"step-{max(steps, default=40):06d}").mkdir(parents=True)
        train = {"steps": max(steps, default=40)} | sections.pop("train", {})
        (folder / "config.toml").write_text(make_config(train=train, **sections).to_toml(), encoding="utf-8")
        base = grid(0, prompts, guidance, side=side)
        for step in steps:
            drawn = {f"step {step}": grid(step, prompts, guidance, side=side)} if step else {}
            save_sheet(folder / "samples" / f"step-{step:06d}.png", {"base model": base, **drawn})
        lines = [metrics_line(step) for step in range(1, train["steps"] + 1)]
        validation = [{"step": step, "validation_subject": 1 - step / 100, "validation_class": 1.0} for step in (0, 40)]
        text = "".join(line + "\n" for line in [*lines, *map(json.dumps, validation)])
        (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
        (folder / "plan.json").write_text(json.dumps(plan()), encoding="utf-8")
        (folder / "evaluation.json").write_text(json.dumps(evaluation()), encoding="utf-8")
        (folder / "identifier.json").write_text(json.dumps(identifier()), encoding="utf-8")
        return folder

    return make
