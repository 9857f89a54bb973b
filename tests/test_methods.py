import json

import numpy as np
import pytest
import tomli_w
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from lowvram_db.demo.miniature import write_sd2, write_sdxl
from lowvram_db.dreambooth import run_dreambooth
from lowvram_db.formats.export import Format, export
from lowvram_db.methods import method_of

LORA = {"name": "lora", "rank": 4, "alpha": 2.0, "targets": "all"}


@pytest.fixture(scope="module")
def models(miniature, tmp_path_factory):
    """A folder of every family that trains."""
    place = tmp_path_factory.mktemp("models")
    write_sd2(place / "sd2")
    write_sdxl(place / "sdxl")
    return {"sd1": miniature, "sd2": place / "sd2", "sdxl": place / "sdxl"}


def metrics(run):
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.mark.parametrize(
    ("kind", "init"), [("sd1", "default"), ("sd1", "pissa"), ("sd2", "default"), ("sdxl", "pissa")]
)
def test_a_run_leaves_a_file_that_diffusers_draws_the_same_pictures_with(kind, init, make_config, models):
    model, pipeline = models[kind], StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline
    text = {"train": True, "lr": 0.02}
    method = LORA | {"init": init}
    config = make_config(model={"name": str(model)}, method=method, text_encoder=text, train={"lr": 0.02})
    run = run_dreambooth(config)
    assert not run.model.exists()
    ours = method_of(config).open(config, run).pipeline()
    theirs, base = pipeline.from_pretrained(model), pipeline.from_pretrained(model)
    theirs.scheduler, base.scheduler = ours.scheduler, ours.scheduler
    theirs.load_lora_weights(run.lora)
    assert theirs.get_list_adapters().keys() == {"unet", "text_encoder", *(["text_encoder_2"] * (kind == "sdxl"))}
    drawn = [
        np.asarray(
            pipe(
                "a photo of a pkblz ball", num_inference_steps=2, height=64, width=64, output_type="np",
                generator=torch.Generator().manual_seed(0),
            ).images
        )
        for pipe in (ours, theirs, base)
    ]  # fmt: skip
    np.testing.assert_allclose(drawn[0], drawn[1], atol=1e-5)
    assert np.abs(drawn[1] - drawn[2]).max() > 1e-3
    with Image.open(run.sample_grid(4)) as sheet:
        assert np.asarray(sheet).std() > 0


def test_checkpoints_hold_the_adapter_alone_and_metrics_are_a_full_runs(make_config):
    run = run_dreambooth(make_config(method=LORA, text_encoder={"train": True}))
    full = run_dreambooth(make_config(text_encoder={"train": True}, output={"name": "full"}))
    for part in ("unet", "text_encoder"):
        stored = load_file(run.checkpoint(4) / f"{part}.safetensors")
        assert stored and all(".lora_A." in name or ".lora_B." in name for name in stored)
        assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert [line.keys() for line in metrics(run)] == [line.keys() for line in metrics(full)]
    assert metrics(run)[0]["loss"] == pytest.approx(metrics(full)[0]["loss"], rel=1e-5)  # it begins without a change


@pytest.mark.parametrize(
    ("method", "optimizer", "train"),
    [
        ({"init": "pissa"}, "adamw", {"ema": 0.9}),
        pytest.param({}, "adam8", {"ema": 0.9}, marks=pytest.mark.slow),
        pytest.param({}, "adam8", {}, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_is_one_that_never_stopped(make_config, method, optimizer, train):
    """To the bit, with what dropout leaves out."""
    sections = {
        "method": LORA | {"dropout": 0.3} | method,
        "text_encoder": {"train": True},
        "optimizer": {"name": optimizer},
        "checkpoint": {"every": 0},
    }
    straight = run_dreambooth(make_config(**sections, train=train, output={"name": "straight"}))
    other = run_dreambooth(make_config(**sections, train={"seed": 1, **train}, output={"name": "other"}))
    halves = {"output": {"name": "halves"}, **sections}
    run_dreambooth(make_config(**halves, train={"steps": 2, **train}))
    torch.manual_seed(99)
    resumed = run_dreambooth(make_config(**halves, train=train))
    one, same, another = (load_file(run.lora) for run in (straight, resumed, other))
    assert one.keys() == same.keys() and all(torch.equal(tensor, same[key]) for key, tensor in one.items())
    assert not all(torch.equal(tensor, another[key]) for key, tensor in one.items())
    assert (resumed.folder / "lora-before-step-000004.safetensors").is_file()


def test_the_file_says_what_it_is_and_for_which_model(make_config, miniature):
    run = run_dreambooth(make_config(method=LORA, train={"steps": 1}))
    with safe_open(run.lora, framework="pt") as file:
        said, names = file.metadata(), list(file.keys())
    assert said["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert (said["ss_network_module"], said["ss_network_dim"], said["ss_network_alpha"]) == ("networks.lora", "4", "2")
    assert (said["ss_base_model_version"], said["ss_output_name"]) == ("sd_v1", "test")
    assert said["modelspec.trigger_phrase"] == "a photo of a pkblz ball"
    assert "lora_adapter_metadata" not in said  # beside alphas diffusers refuses it
    assert all(name.startswith("lora_unet_") for name in names)
    assert sum(name.endswith(".alpha") for name in names) * 3 == len(names)


def test_a_finished_run_is_left_as_it_is(make_config, capsys):
    config = make_config(method=LORA, train={"steps": 1})
    run = run_dreambooth(config)
    before = run.lora.stat().st_mtime_ns
    run_dreambooth(config)
    assert "already trained" in capsys.readouterr().err
    assert run.lora.stat().st_mtime_ns == before


def test_its_run_can_be_written_as_a_whole_model(make_config, tmp_path):
    config = make_config(method=LORA, train={"lr": 0.02})
    run = run_dreambooth(config)
    export(str(run.folder), tmp_path / "whole", Format.diffusers)
    whole = StableDiffusionPipeline.from_pretrained(tmp_path / "whole").unet.state_dict()
    wanted = method_of(config).open(config, run).load_denoiser().state_dict()
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "sections", "message"),
    [
        ({"rank": 0}, {}, "method.rank: should be greater than or equal to 1"),
        ({"name": "full", "rank": 8}, {}, 'method: rank is for a LoRA, and name is "full"; set name = "lora"'),
        ({"targets": "convolutions"}, {}, "method.targets: should be 'attention', 'attention+mlp' or 'all'"),
        ({"rank": 500}, {}, "method.rank: 500 is more than any layer of unet has, which is 64"),
        ({"base": "nf4", "init": "pissa"}, {}, 'method: init: "pissa" takes from frozen weights, which "nf4"'),
        ({"base": "bf16"}, {}, 'method.base: "bf16" is computed in bf16, precision.compute is "fp32"; leave it out'),
        (
            {},
            {"text_encoder": {"train": True, "stop": 2}},
            "text_encoder.stop: a LoRA's text encoders are trained to the end",
        ),
    ],
)
def test_settings_that_mean_nothing_are_refused(make_config, lowvram_db, tmp_path, method, sections, message):

    good = make_config().model_dump(exclude_none=True)
    tree = {**good, **{name: {**good[name], **keys} for name, keys in sections.items()}}
    tree["method"] = {"name": "lora", **method}
    (tmp_path / "run.toml").write_text(tomli_w.dumps(tree))
    code, _, err = lowvram_db("train", tmp_path / "run.toml")
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1
