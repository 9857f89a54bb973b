import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowvram_db import cli
from lowvram_db.config import load
from lowvram_db.sections import DEFAULT_IDENTIFIER
from lowvram_db.train.trainer import Trainer


@pytest.fixture
def toml(make_config, tmp_path):
    path = tmp_path / "ball.toml"
    path.write_text(make_config().to_toml(), encoding="utf-8")
    return path


def test_new_then_train_then_sample(lowvram_db, photos, miniature, tmp_path):
    code, out, _ = lowvram_db("new", "ball", "--photos", photos, "--class", "ball", "--model", miniature)
    assert (code, out) == (0, "wrote ball.toml; now: lowvram-db train ball.toml\n")
    assert load(Path("ball.toml")).subject.identifier == DEFAULT_IDENTIFIER
    small = [
        "train.steps=2",
        "train.resolution=64",
        "prior.count=2",
        "prior.steps=1",
        "sample.steps=1",
        "sample.seeds=1",
    ]
    settings = [word for setting in small for word in ("--set", setting)]
    code, out, err = lowvram_db("train", "ball.toml", *settings)
    assert code == 0, err
    assert out == "model: runs/ball/model\npictures: runs/ball/samples/step-000002.png\nreport: runs/ball/report.html\n"
    options = ["--guidance", "7", "--seeds", "1", "--steps", "1", "--out", "mine.png"]
    code, out, err = lowvram_db("sample", "runs/ball/model", "--prompt", "a ball", "--prompt", "a box", *options)
    assert (code, out) == (0, "pictures: mine.png\n"), err
    assert Path("mine.png").exists()


def one_line(answer, *parts):
    code, out, err = answer
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    for part in parts:
        assert part in err


def test_bad_input_is_answered_in_one_line(lowvram_db, toml, tmp_path):
    one_line(lowvram_db("train", "none.toml"), "none.toml: no such file")
    one_line(lowvram_db("train", toml, "--set", "train.stepz=3"), "unknown key train.stepz", "train.steps")
    one_line(lowvram_db("train", toml, "--set", "train.steps=many"), "train.steps", "integer")
    one_line(lowvram_db("train", toml, "--set", "subject.identifier="), "subject.identifier: must not be empty")
    one_line(lowvram_db("train", toml, "--set", "train.resolution=100"), "not divisible by 8")
    one_line(lowvram_db("train", toml, "--set", "subject.photos=nowhere"), "subject.photos", "nowhere does not exist")
    one_line(lowvram_db("train", toml, "--set", "model.name=nowhere"), "model.name: no folder")
    one_line(lowvram_db("train", toml, "--set", "model.name=some/model"), "the hub cannot be reached")
    one_line(lowvram_db("train", toml, "--resume", "nowhere"), "--resume nowhere: not a checkpoint")
    (tmp_path / "empty").mkdir()
    one_line(lowvram_db("train", toml, "--set", "subject.photos=empty"), "no photos in")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jpg").write_text("hello")
    one_line(lowvram_db("train", toml, "--set", "subject.photos=text"), "a.jpg: not an image")
    one_line(lowvram_db("new", "a", "--photos", "none", "--class", "dog", "--model", "m"), "--photos")
    one_line(lowvram_db("sample", "nowhere", "--prompt", "x"), "model.name: no folder")
    one_line(lowvram_db("sample", "m", "--prompt", "x", "--guidance", "much"), "--guidance much")
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").rglob("*.png"))


def test_the_cache_is_built_looked_at_and_checked(lowvram_db, toml, tmp_path, photos):
    shared = ["--set", f"cache.dir={tmp_path / 'shared'}"]
    code, out, err = lowvram_db("cache", "build", toml, *shared)
    assert (code, out) == (0, f"cache: {tmp_path / 'shared'}\n"), err
    assert len(list((tmp_path / "runs" / "class_images").glob("ball-*/*.png"))) == 3
    assert not (tmp_path / "runs" / "test" / "model").exists()
    code, out, _ = lowvram_db("cache", "info", tmp_path / "shared")
    assert code == 0
    assert out.startswith("views of photos: 8\nprompts: 3\nshards: 3\nsize: 0.")
    code, out, _ = lowvram_db("cache", "verify", tmp_path / "shared")
    assert (code, out.splitlines()[-1]) == (0, "all whole")

    shards = (tmp_path / "shared" / "v3").glob("*.safetensors")
    shard = next(path for path in shards if any("mean" in name for name in load_file(path)))  # every training reads it
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    code, out, err = lowvram_db("cache", "verify", tmp_path / "shared")
    assert code == 2
    assert out.startswith(f"{shard.name}: entry ")
    assert err.startswith(f"error: {tmp_path / 'shared'}: damaged (1 found)") and err.count("\n") == 1
    code, _, err = lowvram_db("train", toml, *shared)
    assert code == 0 and "an entry is damaged; it is encoded again" in err
    assert lowvram_db("cache", "verify", tmp_path / "shared")[0] == 0


def test_a_cache_in_a_wrong_place_is_answered_in_one_line(lowvram_db, toml, tmp_path, photos):
    one_line(lowvram_db("cache", "info", "nowhere"), "nowhere: does not exist")
    one_line(lowvram_db("cache", "verify", photos), "photos: is not a cache of lowvram-db")
    before = sorted(path.name for path in photos.iterdir())
    one_line(lowvram_db("train", toml, "--set", f"cache.dir={photos}"), "is not a cache of lowvram-db")
    assert sorted(path.name for path in photos.iterdir()) == before
    one_line(lowvram_db("train", toml, "--set", "train.flip=true"), "train: flip mirrors every other variant")
    one_line(lowvram_db("train", toml, "--set", "cache.dir="), "cache.dir: must not be empty")


def test_resuming_with_changed_settings_is_refused(lowvram_db, toml, tmp_path):
    assert lowvram_db("train", toml)[0] == 0
    one_line(lowvram_db("train", toml, "--set", "train.lr=1e-3"), "train.lr (0.0001 -> 0.001)", "These may change")
    one_line(lowvram_db("train", toml, "--resume", "never"), "has step-000004 already")


def test_debug_shows_the_traceback(monkeypatch, toml):
    from lowvram_db.errors import UserError

    monkeypatch.setattr(sys, "argv", ["lowvram-db", "train", "none.toml", "--debug"])
    with pytest.raises(UserError):
        cli.main()


@pytest.mark.parametrize("kind", [torch.AcceleratorError, RuntimeError])
def test_a_gpu_that_vanishes_costs_what_was_not_saved(lowvram_db, toml, monkeypatch, tmp_path, kind):
    """On a step, and on all that follows: nothing that is cleaned up may hide what has happened."""
    words = ["train", toml, "--set", "checkpoint.every=1", "--set", "train.steps=3"]
    assert lowvram_db(*words, "--set", "output.name=straight")[0] == 0
    step = Trainer.train_step

    def vanishes(trainer):
        if trainer.step == 2:
            raise kind("CUDA error: unspecified launch failure\nCUDA kernel errors might be reported at another call")
        return step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", vanishes)
        code, _, err = lowvram_db(*words, "--set", "output.name=again")
    assert code == 2
    said = err.splitlines()[-1]
    assert said.startswith(
        "error: the GPU cannot go on (CUDA error: unspecified launch failure); finished work is kept"
    )
    assert lowvram_db(*words, "--set", "output.name=again")[0] == 0
    one, other = (
        (tmp_path / "runs" / name / "model" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
        for name in ("straight", "again")
    )
    assert one == other


def test_what_is_no_fault_of_a_gpu_is_shown_whole(monkeypatch):
    monkeypatch.setattr(cli, "app", lambda **_: (_ for _ in ()).throw(RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        cli.main()


def test_ctrl_c_is_130(lowvram_db, toml, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lowvram_db.dreambooth.subject_photos", interrupted)
    code, _, err = lowvram_db("train", toml)
    assert code == 130
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_help_answers_without_the_heavy_libraries():
    script = "import sys; from lowvram_db import cli; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "lowvram_db", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "DreamBooth" in done.stdout


def test_the_repositorys_root_on_the_path_breaks_nobody(request):
    """`python -m ...` puts it there, and then `import kernels` finds our folder instead of Hugging Face's package."""
    script = "import transformers, diffusers; from diffusers import StableDiffusionPipeline"
    finished = subprocess.run(
        [sys.executable, "-c", script], cwd=request.config.rootpath, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("command", ["cache build", "sample"])
@pytest.mark.parametrize("native", [True, False])
def test_a_precision_that_is_emulated_is_told_as_in_training(
    lowvram_db, toml, miniature, halves_are_native, command, native
):
    halves_are_native(native)
    small = ["--steps", "1", "--seeds", "1", "--guidance", "7", "--resolution", "64"]
    words = {
        "cache build": ["cache", "build", toml, "--set", "precision.compute=bf16"],
        "sample": ["sample", miniature, "--prompt", "a ball", "--precision", "bf16", *small],
    }
    code, _, err = lowvram_db(*words[command])
    assert code == 0, err
    assert err.count("bf16: emulated on this CPU, up to 100 times slower; computing in fp32") == (not native)
