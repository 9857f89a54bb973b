import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn.functional import mse_loss

from lowvram_db.concept import subject_photos
from lowvram_db.demo.miniature import write_sdxl
from lowvram_db.dreambooth import run_dreambooth
from lowvram_db.errors import UserError
from lowvram_db.kernels import bits
from lowvram_db.run import Run
from lowvram_db.sections import TrainConfig
from lowvram_db.train import validation as room
from lowvram_db.train.loop import train
from lowvram_db.train.validation import Validation, interval


def validations(run):
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return {line["step"]: line for line in lines if "validation_subject_loss" in line}


def reference(trainer, photo, prompt):
    """The mean loss of one picture's three draws, each by itself, by torch alone."""
    frame = trainer.batches.cached.photos[photo]
    seed, losses = int(frame.digest[:15], 16), []
    alphas = trainer.family.noise_schedule.alphas_cumprod
    for draw, third in enumerate([(0, 333), (333, 666), (666, 1000)]):
        key = frame.keys[draw % len(frame.keys)]
        moments = trainer.batches.cached.moments([key])
        posterior, noise = (
            bits.normal(tuple(moments.mean.shape[1:]), seed, step=0, sample=draw, stream=stream)[None]
            for stream in (0, 1)
        )
        time = torch.tensor([third[0] + bits.integer(third[1] - third[0], seed, step=0, sample=draw, stream=2)])
        latents = moments.mean + (moments.logvar / 2).exp() * posterior
        noisy = alphas[time].sqrt() * latents + (1 - alphas[time]).sqrt() * noise
        text = trainer.batches.cached.conditioning([prompt])["text"]
        with torch.no_grad():
            losses.append(mse_loss(trainer.denoiser(noisy, time, text).sample, noise).item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_losses_are_those_of_the_first_pictures_by_digest(make_config, make_trainer, batch):
    config = make_config(train={"hold_out": 1, "batch": batch, "variants": 2})
    trainer = make_trainer(config)
    measured = Validation(trainer, {}).measure()
    held_out, *seen = sorted(
        trainer.batches.concept.instance_photos, key=lambda p: trainer.batches.cached.photos[p].digest
    )
    wanted = {"held_out": [held_out], "subject": seen[:3]}
    for kind, photos in wanted.items():
        loss = sum(reference(trainer, photo, "a photo of a pkblz ball") for photo in photos) / len(photos)
        assert measured[f"validation_{kind}_loss"] == pytest.approx(loss, rel=1e-5)
        assert measured[f"validation_{kind}"] == 1
    assert measured["validation_class"] == 1
    digests = sorted(frame.digest for frame in trainer.batches.cached.class_photos.values())
    assert [picture.digest for picture in room._chosen(trainer.batches)["class"]] == digests[:4] != digests
    trainer.train_step()
    assert trainer.batches.held_out_photos == [held_out]


MODELS = {
    "SD 1": {},
    "text encoder": {"text_encoder": {"train": True}},
    "SDXL, buckets": {"train": {"crop": "buckets", "variants": 2}},
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if "SDXL" in name else []) for name in MODELS]
)
def test_a_run_ends_in_the_same_bits_with_and_without(make_config, tmp_path, name):
    shared = {"cache": {"dir": str(tmp_path / "shared")}, "prior": {"count": 2, "images": str(tmp_path / "class")}}
    if "SDXL" in name:
        write_sdxl(tmp_path / "model")
        shared["model"] = {"name": str(tmp_path / "model")}

    def run(where, every):
        train = {**MODELS[name].get("train", {}), "validate_every": every, "steps": 3}
        return run_dreambooth(make_config(**{**MODELS[name], **shared, "train": train}, output={"name": where}))

    without, with_ = run("without", 0), run("with", 1)
    one, other = (load_file(of.model / "unet" / "diffusion_pytorch_model.safetensors") for of in (without, with_))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert not validations(without)
    found = validations(with_)
    assert sorted(found) == [0, 1, 2, 3]
    assert found[0]["validation_subject"] == found[0]["validation_class"] == 1
    for line in found.values():
        for kind in ("subject", "class"):
            loss = line[f"validation_{kind}_loss"]
            assert line[f"validation_{kind}"] == pytest.approx(loss / found[0][f"validation_{kind}_loss"])
    assert found[3]["validation_subject"] != 1


def test_dropout_takes_no_random_numbers_of_training(make_config, make_trainer):
    trainer = make_trainer(make_config())
    for module in trainer.denoiser.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    before = torch.get_rng_state()
    first, second = (Validation(trainer, {}).measure() for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), before)
    assert all(network.training for network in trainer.modules.values())


def test_a_resumed_run_has_the_curve_of_a_straight_one(make_config, tmp_path):
    def run(where, steps, **train):
        settings = {"train": {"steps": steps, "validate_every": 2, **train}, "output": {"name": where}}
        shared = {"cache": {"dir": str(tmp_path / "shared")}, "prior": {"count": 2, "images": str(tmp_path / "class")}}
        return run_dreambooth(make_config(**settings, **shared))

    straight = validations(run("straight", 4))
    run("resumed", 2)
    assert validations(run("resumed", 4)) == straight
    run("lost", 2)
    Run(tmp_path / "runs" / "lost").metrics.unlink()
    assert validations(run("lost", 4, validate_every=4)) == {
        4: {name: value for name, value in straight[4].items() if name == "step" or name.endswith("_loss")}
    }


def test_one_that_fails_ends_no_run(make_config, make_trainer, tmp_path, monkeypatch, capfd):
    trainer = make_trainer(make_config(train={"validate_every": 1, "steps": 2}))
    monkeypatch.setattr(Validation, "_losses", lambda *_: 1 / 0)
    train(trainer, Run(tmp_path / "run"), lambda path: None)
    assert trainer.step == 2
    assert capfd.readouterr().err.count("validation left out: division by zero") == 3


@given(
    steps=st.integers(1, 5000),
    batch=st.integers(1, 4),
    accumulate=st.integers(1, 3),
    prior=st.booleans(),
    rows=st.integers(3, 24),
)
def test_by_itself_it_takes_three_hundredths_of_a_run_at_most(steps, batch, accumulate, prior, rows):
    step_rows = batch * (2 if prior else 1)
    every = interval(TrainConfig(steps=steps, batch=batch, accumulate=accumulate), step_rows, rows)
    passes = 3 * steps * accumulate * step_rows  # backward is worth two of forward
    if every:
        assert (1 + math.ceil(steps / every)) * rows <= 0.03 * passes
    else:
        assert 2 * rows > 0.03 * passes, "there was room for the first and the last"


def test_the_default_recipe_is_validated_about_five_times():
    assert interval(TrainConfig(), 2, 24) == 160


@pytest.mark.parametrize(("held_out", "refused"), [(0, False), (1, False), (2, False), (3, True), (9, True)])
def test_three_photos_are_left_to_train_on(make_config, held_out, refused):
    config = make_config(train={"hold_out": held_out})
    if refused:
        with pytest.raises(UserError, match=rf"train.hold_out: of 5 photos, {held_out} kept back"):
            subject_photos(config)
    else:
        assert len(subject_photos(config)) == 5


def test_held_out_photos_stand_in_no_batch(make_config, make_trainer):
    batches = make_trainer(make_config(train={"hold_out": 2}, prior={"enabled": False})).batches
    keys = {batches.cached.photos[photo].keys[0] for photo in batches.concept.instance_photos}
    held_out = {batches.cached.photos[photo].keys[0] for photo in batches.held_out_photos}
    asked = []
    batches.cached.store.stack, stack = lambda keys: asked.extend(keys) or stack(keys), batches.cached.store.stack
    for step in range(12):
        batches[step]
    assert set(asked) == keys - held_out
    assert room._chosen(batches)["held_out"]
