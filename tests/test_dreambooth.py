import errno
import gc
import json
import shutil
import subprocess
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import lowvram_db
from lowvram_db import dreambooth as room
from lowvram_db.config import load
from lowvram_db.demo.miniature import write_sd2, write_sdxl
from lowvram_db.dreambooth import build_cache, run_dreambooth
from lowvram_db.errors import DoesNotFit, Interrupted, UserError
from lowvram_db.families import open_blank
from lowvram_db.families.sd import StableDiffusion
from lowvram_db.memory import only_read
from lowvram_db.memory.device import pick_device
from lowvram_db.plan.choose import choose
from lowvram_db.run import Run
from lowvram_db.sheet import read_grid
from lowvram_db.train import checkpoint
from lowvram_db.train.strategy import Strategy


def unet_of(run):
    return load_file(run.model / "unet" / "diffusion_pytorch_model.safetensors")


def test_a_run_on_real_photos_from_start_to_picture(make_config, dog_photos):
    run = run_dreambooth(make_config(subject={"photos": str(dog_photos), "class": "dog"}))
    assert len(list(run.folder.parent.glob("class_images/dog-*/*.png"))) == 3
    assert checkpoint.latest(run.checkpoints) == run.checkpoint(4)
    assert load(run.config).subject.class_noun == "dog"
    assert Image.open(run.sample_grid(4)).height > 3 * 64
    pipeline = StableDiffusionPipeline.from_pretrained(run.model)
    assert pipeline("a photo of a pkblz dog", num_inference_steps=1, height=64, width=64).images[0].size == (64, 64)


def test_where_the_plan_says_so_all_that_draws_has_its_weights_in_ram(make_config, monkeypatch):
    """Class images, the base model, the result; and what checks what is predicted."""
    made, plan = [], room._plan

    class Noted(only_read.OnlyRead):
        def __init__(self, *how):
            super().__init__(*how)
            made.append(self.is_streamed)

    monkeypatch.setattr("lowvram_db.families.draw.OnlyRead", Noted)
    monkeypatch.setattr("lowvram_db.prediction_check.OnlyRead", Noted)
    monkeypatch.setattr(room, "_plan", lambda *how: replace(plan(*how), drawn_streamed=True))
    run_dreambooth(make_config(train={"steps": 1}))
    assert made == [True] * 4


ENDS_IN_NOISE = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
GENERATIONS = {
    "SD 2": (write_sd2, {}, {}, {}),
    "SDXL": (write_sdxl, {}, {"crop": "buckets", "variants": 2, "flip": True}, {}),
    "SDXL and its text encoders, v prediction that ends in noise": (
        write_sdxl,
        ENDS_IN_NOISE,
        {"min_snr_gamma": 5.0},
        {"train": True},
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "SDXL" else []) for name in GENERATIONS]
)
def test_every_generation_trains_resumes_bit_for_bit_samples_and_is_loaded_by_diffusers(make_config, tmp_path, name):
    write, schedule, train, text = GENERATIONS[name]
    write(tmp_path / "model", **schedule)
    shared = {"model": {"name": str(tmp_path / "model")}, "cache": {"dir": str(tmp_path / "shared")}}

    def run(where, steps, **sections):
        settings = {"train": {**train, "steps": steps}, "text_encoder": text, "output": {"name": where}}
        settings |= shared | sections
        return run_dreambooth(make_config(**settings))

    straight = run("straight", 4, sample={"every": 2})
    run("resumed", 2)
    resumed = run("resumed", 4)
    wanted, got = (sorted(model.rglob("*.safetensors")) for model in (straight.model, resumed.model))
    assert [path.read_bytes() for path in wanted] == [path.read_bytes() for path in got]
    assert straight.sample_grid(2).exists()
    assert straight.sample_grid(4).read_bytes() == resumed.sample_grid(4).read_bytes()

    trained = {"unet"} | ({"text_encoder", "text_encoder_2"} if text else set())
    for path in wanted:
        before, after = load_file(tmp_path / "model" / path.relative_to(straight.model)), load_file(path)
        assert before.keys() == after.keys()
        moved = [key for key in before if not torch.equal(before[key], after[key])]
        assert bool(moved) == (path.parent.name in trained), path
    pipeline = DiffusionPipeline.from_pretrained(straight.model)
    assert pipeline("a pkblz ball", num_inference_steps=1, height=64, width=64).images[0].size == (64, 64)


def test_every_weight_of_the_unet_is_trained(make_config, miniature):
    before = load_file(miniature / "unet" / "diffusion_pytorch_model.safetensors")
    after = unet_of(run_dreambooth(make_config(train={"steps": 2, "lr": 1e-2})))
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert not same


@pytest.mark.parametrize(("text_encoder", "denoisers"), [({}, 5), ({"train": True, "stop": 2}, 6)])
def test_no_other_weights_are_in_memory_when_a_denoiser_comes(make_config, monkeypatch, text_encoder, denoisers):
    """For the check, class images, its own pictures, training, once more after the text encoders, and the result."""
    load_denoiser, seen = StableDiffusion.load_denoiser, []

    def count_weights():
        gc.collect()
        return sum(isinstance(thing, nn.Parameter) for thing in gc.get_objects())

    def watched(family, narrow):
        seen.append(count_weights())
        return load_denoiser(family, narrow)

    monkeypatch.setattr(StableDiffusion, "load_denoiser", watched)
    before = count_weights()
    run_dreambooth(make_config(text_encoder=text_encoder))
    assert seen == [before] * denoisers


def test_another_run_takes_the_class_images_that_one_has_made(make_config, miniature, tmp_path):
    """Also with another seed, from a copy of the model elsewhere: nothing in the folder changes."""
    build_cache(make_config())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "class_images").rglob("*")}
    assert len(before) == 4
    copy = shutil.copytree(miniature, tmp_path / "copy")
    build_cache(make_config(model={"name": str(copy)}, train={"seed": 9}, output={"name": "other"}))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "class_images").rglob("*")} == before


def test_odd_photos_are_said_before_a_run_and_end_it_where_that_is_wanted(make_config, tmp_path, capfd):
    (tmp_path / "few").mkdir()
    for name, side in (("a", 96), ("b", 32)):
        Image.effect_noise((side, side), 99).save(tmp_path / "few" / f"{name}.png")
    shutil.copytree(tmp_path / "few", tmp_path / "class")
    config = make_config(
        subject={"photos": str(tmp_path / "few")},
        prior={"images": str(tmp_path / "class"), "count": 1},
        train={"steps": 1},
    )
    with pytest.raises(UserError, match=r"--strict: subject\.photos: 2 is few.* \(3 warnings\)"):
        run_dreambooth(config, strict=True)
    said = capfd.readouterr().err
    assert "class/a.png     is nearly the same as a.png, and would teach the subject" in said
    assert "b.png           32 x 32 is small: enlarged 2.0 times to 64" in said and "training" not in said
    assert run_dreambooth(config).model.exists()
    said = capfd.readouterr().err
    assert "is few" in said and "identifier pkblz: 5 tokens (p k b l z); no meaning of its own" in said


def test_without_prior_preservation_no_class_image_is_made(make_config):
    run = run_dreambooth(make_config(prior={"enabled": False}))
    assert not (run.folder.parent / "class_images").exists()
    assert run.model.exists()


def test_buckets_and_variants_train_and_resume_exactly(make_config, photos, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, photo in enumerate(sorted(photos.iterdir())):
        Image.open(photo).resize((160, 96) if number % 2 else (96, 96)).save(folder / photo.name)
    settings = {"subject": {"photos": str(folder)}, "cache": {"dir": str(tmp_path / "shared")}}
    train = {"crop": "buckets", "variants": 3, "flip": True, "steps": 6, "batch": 2}
    straight = run_dreambooth(make_config(train=train, output={"name": "straight"}, **settings))
    halfway = make_config(train=train | {"steps": 3}, output={"name": "resumed"}, **settings)
    run_dreambooth(halfway)
    resumed = run_dreambooth(make_config(train=train, output={"name": "resumed"}, **settings))
    wanted = unet_of(straight)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in unet_of(resumed).items())
    plain = run_dreambooth(make_config(train={"steps": 6, "batch": 2}, output={"name": "plain"}, **settings))
    assert not all(torch.equal(tensor, wanted[name]) for name, tensor in unet_of(plain).items())


def test_a_second_start_decodes_no_photo_and_loads_no_encoder(make_config, monkeypatch):
    monkeypatch.setattr("lowvram_db.cache.catalogue._SETTLED_SECONDS", -1.0)
    config = make_config()
    build_cache(config)

    def fail(*_):
        pytest.fail("decoded or loaded again")

    for where in ("concept.load_photo", "concept.class_images.load_photo", "cache.catalogue.decode_photo"):
        monkeypatch.setattr(f"lowvram_db.{where}", fail)
    for method in ("load_vae", "load_text_encoders", "load_denoiser"):
        monkeypatch.setattr(StableDiffusion, method, fail)
    build_cache(config)


def test_a_trained_run_goes_by_content(make_config, miniature, photos, tmp_path):
    """An edited photo and another model are refused, also by a finished run; the same ones elsewhere go on."""
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    config = make_config(subject={"photos": str(folder)}, checkpoint={"every": 0})
    longer = make_config(subject={"photos": str(folder)}, checkpoint={"every": 0}, train={"steps": 5})
    run_dreambooth(config)
    original = (folder / "01.png").read_bytes()
    Image.open(folder / "01.png").rotate(90).save(folder / "01.png")
    for again in (config, longer):
        with pytest.raises(
            UserError, match=r"was trained on other photos .*: photos \(1 new, 1 gone or changed\); bring"
        ):
            run_dreambooth(again)
    (folder / "01.png").write_bytes(original)

    shutil.copytree(miniature, tmp_path / "model")
    tmp_path.joinpath("renamed").mkdir()
    for number, photo in enumerate(sorted(folder.iterdir(), reverse=True)):
        shutil.copy(photo, tmp_path / "renamed" / f"{number}.png")
    elsewhere = {"subject": {"photos": str(tmp_path / "renamed")}, "model": {"name": str(tmp_path / "model")}}
    moved = run_dreambooth(make_config(checkpoint={"every": 0}, train={"steps": 5}, **elsewhere))
    straight = run_dreambooth(make_config(train={"steps": 5}, checkpoint={"every": 0}, output={"name": "straight"}))
    assert all(torch.equal(tensor, unet_of(moved)[name]) for name, tensor in unet_of(straight).items())

    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 1.001 for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(UserError, match="another base model; bring"):
        run_dreambooth(make_config(checkpoint={"every": 0}, train={"steps": 5}, **elsewhere))


@pytest.fixture
def pages(monkeypatch):
    """How many sheets of pictures were there for each page that is written."""
    written = []
    monkeypatch.setattr(room, "write_report", lambda folder: written.append(len(Run(folder).sample_grids())))
    return written


def test_pictures_and_pages_on_the_way(make_config, pages):
    run = run_dreambooth(make_config(sample={"every": 1}))
    grids = sorted(path.name for path in run.samples.iterdir())
    assert grids == [f"step-{step:06d}.png" for step in (0, 1, 2, 3, 4)]
    assert pages == [2, 3, 4, 5]


def test_a_picture_that_fails_ends_no_training_and_costs_no_page(make_config, monkeypatch, capfd, pages):
    wanted = unet_of(run_dreambooth(make_config(output={"name": "straight"})))
    pages.clear()

    def fail(*_, **__):
        raise ZeroDivisionError("in a solver")

    monkeypatch.setattr("lowvram_db.sheet.draw_grid", fail)
    run = run_dreambooth(make_config(sample={"every": 2}))
    said = capfd.readouterr().err
    assert "pictures of the base model left out: in a solver" in said
    assert "step 2: pictures left out: in a solver" in said
    assert "pictures of the result left out: in a solver" in said
    assert pages == [0, 0], "of step 2, and at the end"
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in unet_of(run).items())
    monkeypatch.undo()
    run_dreambooth(make_config(sample={"every": 2}))
    assert run.sample_grid(4).exists(), "the same command draws what was left out"


def test_the_base_models_pictures_stand_above_and_are_drawn_anew_where_others_are_asked_for(make_config):
    """They are those of the model that training begins with: of one that does not learn, the same as every other's."""
    still = {"lr": 1e-30, "steps": 2}
    run = run_dreambooth(make_config(train=still))
    base, result = read_grid(run.sample_grid(0)), read_grid(run.sample_grid(2))
    assert list(base.pictures) == list(result.pictures)
    assert all(base.pictures[drawn].tobytes() == picture.tobytes() for drawn, picture in result.pictures.items())
    alone = 3 * (64 + 4)
    assert Image.open(run.sample_grid(2)).height - Image.open(run.sample_grid(0)).height >= alone

    drawn_at = run.sample_grid(0).stat().st_mtime_ns
    run_dreambooth(make_config(train=still | {"steps": 3}))
    assert run.sample_grid(0).stat().st_mtime_ns == drawn_at
    run_dreambooth(make_config(train=still | {"steps": 4}, sample={"prompts": ["a {class}"]}))
    assert read_grid(run.sample_grid(0)).prompts == read_grid(run.sample_grid(4)).prompts == ["a ball"]


@pytest.mark.parametrize(
    "sections",
    [
        {},
        pytest.param({"text_encoder": {"train": True}}, marks=pytest.mark.slow),
        {"text_encoder": {"train": True, "stop": 1}},
        pytest.param({"train": {"ema": 0.5}}, marks=pytest.mark.slow),
        pytest.param({"train": {"ema": 0.5}, "text_encoder": {"train": True, "stop": 1}}, marks=pytest.mark.slow),
        pytest.param({"train": {"ema": 0.5}, "text_encoder": {"train": True}}, marks=pytest.mark.slow),
    ],
)
def test_pictures_on_the_way_are_those_of_the_weights(make_config, sections):
    """The grid that training draws is the one that the model saved at that step draws on its own; and what is trained
    on goes on as if nothing had been drawn."""

    def run(name, steps, every=0):
        train = {"lr": 1e-3, "steps": steps, **sections.get("train", {})}
        return run_dreambooth(
            make_config(**{**sections, "train": train}, sample={"every": every}, output={"name": name})
        )

    during, shorter, longer = run("during", 3, every=1), run("shorter", 2), run("longer", 3)
    assert during.sample_grid(2).read_bytes() == shorter.sample_grid(2).read_bytes()
    assert during.sample_grid(1).read_bytes() != during.sample_grid(2).read_bytes()
    files = [
        sorted(path.relative_to(run.model) for path in run.model.rglob("*.safetensors")) for run in (during, longer)
    ]
    assert files[0] == files[1]
    assert all((during.model / file).read_bytes() == (longer.model / file).read_bytes() for file in files[0])


@pytest.mark.parametrize("stop", [pytest.param(None, marks=pytest.mark.slow), 2])
def test_the_saved_model_is_the_average_and_the_checkpoint_has_both(make_config, stop):
    """Text encoders that have stopped are what a run of so many steps would have made of them."""

    def run(name, steps, **text):
        train = {"ema": 0.9, "lr": 1e-3, "steps": steps}
        sections = {"text_encoder": {"train": True, **text}, "checkpoint": {"every": 2, "keep": 2}}
        return run_dreambooth(make_config(train=train, output={"name": name}, **sections))

    def text_of(run):
        return load_file(run.model / "text_encoder" / "model.safetensors")

    longer = run("longer", 4, stop=stop)
    for step in (2, 4):
        files = {path.stem: load_file(path) for path in longer.checkpoint(step).glob("*.safetensors")}
        going_on = len(files["unet"]) + len(files.get("text_encoder", {}))
        assert {int(name.partition("/")[0]) for name in files["optimizer"]} == set(range(going_on))
    average = files["ema"] | files.get("frozen", {})
    saved = {f"unet.{name}": tensor for name, tensor in unet_of(longer).items()}
    saved |= {f"text_encoder.{name}": tensor for name, tensor in text_of(longer).items()}
    assert saved.keys() == average.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in average.items())
    assert not all(torch.equal(saved[f"unet.{name}"], tensor) for name, tensor in files["unet"].items())
    as_stopped = text_of(run("shorter", 2))
    assert all(torch.equal(tensor, as_stopped[name]) for name, tensor in text_of(longer).items()) == (stop is not None)


def test_sampling_on_the_way_changes_nothing(make_config):
    plain = unet_of(run_dreambooth(make_config(output={"name": "plain"})))
    sampled = unet_of(run_dreambooth(make_config(output={"name": "sampled"}, sample={"every": 1})))
    assert all(torch.equal(tensor, sampled[name]) for name, tensor in plain.items())


def test_a_page_is_there_when_a_run_is_stopped_and_when_a_finished_one_is_asked_for_again(make_config, monkeypatch):
    config = make_config(train={"steps": 2})
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr("lowvram_db.train.loop.stop_on_request", lambda: nullcontext(lambda: True))
        run_dreambooth(config)
    page = Run.of(config).report
    assert "It stands at step 1 of 2" in page.read_text("utf-8") and "Identifier" in page.read_text("utf-8")
    run_dreambooth(config)
    assert "It stands at" not in page.read_text("utf-8")
    page.unlink()
    run_dreambooth(config)
    assert "step 2" in page.read_text("utf-8")


def test_a_finished_run_is_left_alone(make_config, capfd):
    run = run_dreambooth(make_config())
    before = {path: path.stat().st_mtime_ns for path in run.model.rglob("*")}
    run_dreambooth(make_config())
    assert "already trained for 4 steps" in capfd.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in run.model.rglob("*")} == before


def test_half_precision_on_disk_is_the_default_and_rounds_once(make_config):
    exact = unet_of(run_dreambooth(make_config(output={"name": "exact"})))
    config = make_config()
    by_default = type(config.output)(dir=config.output.dir, name="half")
    tensors = unet_of(run_dreambooth(config.model_copy(update={"output": by_default})))
    assert all(torch.equal(tensor, exact[name].half()) for name, tensor in tensors.items())


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "fp16"])
def test_the_last_step_is_written_once_where_checkpoint_and_model_are_the_same(
    make_config, monkeypatch, links, precision
):
    """And stays when the checkpoint goes; a disk without links has it twice."""

    def no_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr("os.link", no_links)
    settings = {"precision": {"compute": precision}, "text_encoder": {"train": True}, "checkpoint": {"every": 0}}
    run = run_dreambooth(make_config(**settings, output={"dtype": precision}))
    for part, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        kept, model = run.checkpoint(4) / f"{part}.safetensors", run.model / part / f"{name}.safetensors"
        assert kept.samefile(model) == links
        assert kept.read_bytes() == model.read_bytes()
    before = unet_of(run)
    longer = make_config(**settings, train={"steps": 5}, output={"dtype": precision})
    run_dreambooth(longer)
    assert list(checkpoint.steps(run.checkpoints)) == [5]
    aside = load_file(run.folder / "model-before-step-000005" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, aside[name]) for name, tensor in before.items())
    assert not all(torch.equal(tensor, aside[name]) for name, tensor in unet_of(run).items())


@pytest.mark.parametrize("compute", ["bf16", "fp16"])
def test_mixed_precision_runs_to_the_end(make_config, compute):
    run = run_dreambooth(make_config(precision={"compute": compute}, sample={"every": 2}))
    assert {tensor.dtype for tensor in unet_of(run).values()} == {torch.float32}


@pytest.mark.parametrize("text_encoder", [False, True])
def test_a_run_whose_precision_would_be_emulated_says_so_once_and_ends(
    make_config, halves_are_native, capfd, text_encoder
):
    halves_are_native(False)
    sections = {"precision": {"compute": "bf16"}, "text_encoder": {"train": text_encoder}, "sample": {"every": 2}}
    run = run_dreambooth(make_config(**sections))
    said = capfd.readouterr().err
    assert said.count("bf16: emulated on this CPU, up to 100 times slower; computing in fp32") == 1
    assert "M weights on cpu, fp32, attention" in said and "left out" not in said
    assert run.sample_grid(2).exists() and run.sample_grid(4).exists()
    assert {tensor.dtype for tensor in unet_of(run).values()} == {torch.float32}


def test_a_bad_photo_stops_the_run_before_any_work(make_config, photos, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for photo in photos.iterdir():
        (folder / photo.name).write_bytes(photo.read_bytes())
    (folder / "zz.jpg").write_bytes((folder / "00.png").read_bytes()[:200])
    with pytest.raises(UserError, match=r"zz\.jpg: damaged or cut off"):
        run_dreambooth(make_config(subject={"photos": str(folder)}))
    assert not (tmp_path / "runs").exists()


def test_a_prompt_that_would_be_cut_stops_the_run_before_any_work(make_config):
    config = make_config(sample={"prompts": ["word " * 70]})
    with pytest.raises(UserError, match="the model reads 77"):
        run_dreambooth(config)


def test_a_full_gpu_is_said_in_one_line(make_config, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(StableDiffusion, "denoise", full)
    with pytest.raises(DoesNotFit, match=r"Tried to allocate 2.00 GiB.*finished work is kept") as caught:
        run_dreambooth(make_config(prior={"enabled": False}))
    assert caught.value.exit_code == 3


def test_a_disk_that_fills_up_leaves_the_last_good_checkpoint(make_config, small_disk):
    """The disk has room for one checkpoint and a half; freeing some lets the run go on to the end it would have had."""
    straight = unet_of(run_dreambooth(make_config()))
    disk = small_disk("10m")
    config = make_config(output={"dir": str(disk)})
    with pytest.raises(UserError, match=r"step-000004: the disk is full .*last good checkpoint is .*step-000002"):
        run_dreambooth(config)
    assert sorted(path.name for path in (disk / "test" / "checkpoints").iterdir()) == ["step-000002"]
    subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
    resumed = unet_of(run_dreambooth(config))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in straight.items())


def test_a_run_killed_before_its_last_pictures_only_draws_them(make_config):
    run = run_dreambooth(make_config())
    grid = run.sample_grid(4).read_bytes()
    before = {path: path.stat().st_mtime_ns for path in run.model.rglob("*")}
    run.sample_grid(4).unlink()
    run_dreambooth(make_config())
    assert run.sample_grid(4).read_bytes() == grid
    assert {path: path.stat().st_mtime_ns for path in run.model.rglob("*")} == before


@pytest.mark.parametrize("begin", [run_dreambooth, build_cache])
def test_the_allocator_is_capped_at_the_budget_before_anything_is_loaded(make_config, monkeypatch, begin):
    done = []

    def budget_for(vram, device):
        done.append(("budget of", vram))
        return 2**35

    def stop(*_):
        done.append("loads")
        raise ZeroDivisionError

    monkeypatch.setattr(room, "budget_for", budget_for)
    monkeypatch.setattr(room, "cap", lambda budget, device: done.append(("cap", budget, device.type)))
    monkeypatch.setattr(room, "class_images", stop)
    with pytest.raises(ZeroDivisionError):
        begin(make_config(memory={"vram": "12GiB"}))
    assert done == [("budget of", "12GiB"), ("cap", 2**35, pick_device().type), "loads"]


@pytest.mark.parametrize(("device", "free", "said"), [("cuda", 3, True), ("cuda", 5, False), ("cpu", 3, False)])
def test_little_ram_beside_a_gpu_is_said(monkeypatch, capfd, device, free, said):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=free * 2**30))
    plan = SimpleNamespace(least_ram_bytes=4 * 2**30, strategy=Strategy(0, 1), drawn_streamed=False)
    room._check_ram(plan, torch.device(device))
    line = "3.00 GiB of RAM are free, and about 4.00 GiB are wanted; close other programs"
    assert (line in capfd.readouterr().err) == said


def test_a_model_whose_scheduler_says_the_wrong_prediction_is_refused_before_any_picture(make_config, tmp_path, capfd):
    """The base model of the demo, which predicts v."""
    base = shutil.copytree(Path(lowvram_db.__file__).parent / "demo" / "base", tmp_path / "base")
    path = base / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "epsilon"}))
    photos = {"photos": str(Path(lowvram_db.__file__).parent / "demo" / "jellyfish"), "class": "jellyfish"}

    def config(**model):
        return make_config(model={"name": str(base), **model}, subject=photos, train={"steps": 1})

    with pytest.raises(
        UserError, match=r'says epsilon, but the weights predict v_pred.*; set model\.prediction_type = "v_prediction"'
    ):
        run_dreambooth(config())
    assert not list((tmp_path / "runs").rglob("class-*.png"))
    capfd.readouterr()
    run = run_dreambooth(config(prediction_type="v_prediction"))
    assert "the weights predict" not in capfd.readouterr().err
    saved = json.loads((run.model / "scheduler" / "scheduler_config.json").read_text())
    assert saved["prediction_type"] == "v_prediction"
    assert json.loads(path.read_text())["prediction_type"] == "epsilon", "the user's own file stays"


def test_what_keeps_a_run_from_its_gpu_comes_first(make_config, monkeypatch, capfd):
    """A card that torch cannot use; and one on which Triton does not run."""

    def refused(config, device):
        raise UserError("optimizer.name: adam8 needs Triton on a GPU")

    monkeypatch.setattr("lowvram_db.memory.driver.version", lambda: "470.256.02")
    monkeypatch.setattr("lowvram_db.dreambooth.that_runs", refused)
    with pytest.raises(UserError, match="adam8 needs Triton"):
        run_dreambooth(make_config())
    said = capfd.readouterr().err
    assert torch.cuda.is_available() or "training on the CPU, though there is an NVIDIA driver (470.256.02)" in said


def test_a_run_that_would_swap_all_the_time_does_not_begin(make_config, miniature, monkeypatch, capfd):
    plan = choose(make_config(), open_blank(miniature), 2**40)
    streamed = replace(plan, strategy=replace(plan.strategy, streamed=8), least_ram_bytes=int(10.4 * 2**30))
    memory = room.psutil.virtual_memory()
    monkeypatch.setattr(room.psutil, "virtual_memory", lambda: memory._replace(available=int(9.1 * 2**30)))
    for needs in (streamed, replace(streamed, strategy=plan.strategy, drawn_streamed=True)):
        with pytest.raises(DoesNotFit, match=r"^needs 10\.40 GiB of RAM, 9\.10 GiB are free; close other .*--vram"):
            room._check_ram(needs, torch.device("cuda"))
    room._check_ram(replace(streamed, least_ram_bytes=9 * 2**30), torch.device("cuda"))
    assert capfd.readouterr().err == ""
    room._check_ram(replace(streamed, strategy=plan.strategy), torch.device("cuda"))  # which swaps once, while it loads
    assert "9.10 GiB of RAM are free, and about 10.40 GiB are wanted" in capfd.readouterr().err
