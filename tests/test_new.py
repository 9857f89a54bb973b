import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lowvram_db.config import load
from lowvram_db.errors import UserError
from lowvram_db.new import train_command, write_config

MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def test_the_written_config_loads_with_the_defaults(photos, tmp_path):
    path = tmp_path / "jelly.toml"
    write_config(path, str(photos), "jellyfish", MODEL, "pkblz")
    config = load(path)
    assert (config.subject.identifier, config.subject.class_noun, config.model.name) == ("pkblz", "jellyfish", MODEL)
    assert config.subject.photos == str(photos)
    assert config.train.lr == 2e-6


def test_every_offered_line_is_its_default(photos, tmp_path):
    """Taking the mark off all lines changes nothing but the keys that have no default."""
    path = tmp_path / "jelly.toml"
    write_config(path, str(photos), "jellyfish", MODEL, "pkblz")
    plain = load(path)
    path.write_text(re.sub(r"^# (?=\w+ = )", "", path.read_text(), flags=re.MULTILINE))
    offered = load(path)
    assert (offered.prior.images, offered.train.min_snr_gamma) == ("class_images/dog", 5.0)
    assert offered.train.max_norm == 1.0
    assert (offered.cache.dir, offered.train.gradient_checkpointing, offered.memory.vram) == ("cache", True, "12GiB")
    assert offered.prior.prompts == ["a photo of a {class}", "a picture of a {class}"]
    changed = ("prior", "train", "precision", "cache", "memory", "checkpoint")
    assert offered.model_copy(update={section: getattr(plain, section) for section in changed}) == plain
    assert offered.weights == plain.weights == "bf16"
    assert offered.prior.model_copy(update={"images": None, "prompts": None}) == plain.prior
    unset = {"ema": None, "min_snr_gamma": None, "max_norm": None, "gradient_checkpointing": None}
    assert offered.train.model_copy(update=unset) == plain.train
    assert offered.cache.model_copy(update={"dir": None}) == plain.cache
    assert offered.checkpoint.model_copy(update={"every": None}) == plain.checkpoint


def test_settings_that_follow_from_what_the_model_is(photos, miniature, tmp_path, capfd):
    path = tmp_path / "a.toml"
    write_config(path, str(photos), "dog", str(miniature), "pkblz")
    assert (load(path).train.resolution, load(path).output.dtype) == (64, "fp32")
    assert "cannot be trained" not in capfd.readouterr().err
    double = Path(shutil.copytree(miniature, tmp_path / "double")) / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor.double() for name, tensor in load_file(double).items()}, double)
    write_config(tmp_path / "double.toml", str(photos), "dog", str(tmp_path / "double"), "pkblz")
    assert load(tmp_path / "double.toml").output.dtype == "fp16", "nothing is written in fp64"
    write_config(tmp_path / "xl.toml", str(photos), "dog", "stabilityai/stable-diffusion-xl-base-1.0", "pkblz")
    assert load(tmp_path / "xl.toml").train.resolution == 1024
    save_file({"lora_unet_mid_block.lora_up.weight": torch.ones(1)}, tmp_path / "lora.safetensors")
    write_config(tmp_path / "b.toml", str(photos), "dog", str(tmp_path / "lora.safetensors"), "pkblz")
    assert "a LoRA or another adapter, which changes a model and is none cannot be trained" in capfd.readouterr().err


@pytest.mark.parametrize("noun, prompts, crop", [("Woman", "person", "buckets"), ("dog", None, "square")])
def test_a_person_is_learnt_as_one(photos, tmp_path, noun, prompts, crop):
    write_config(tmp_path / "a.toml", str(photos), noun, MODEL, "pkblz")
    config = load(tmp_path / "a.toml")
    assert (config.prior.prompts, config.train.crop) == (prompts, crop)
    assert config.subject.prompts == (prompts or ["a photo of a {identifier} {class}"])


def test_what_is_found_beside_the_photos_is_said(photos, tmp_path, capfd):
    write_config(tmp_path / "a.toml", str(photos), "dog", MODEL, "pkblz")
    assert "captions" not in (said := capfd.readouterr().err) and "mask" not in said and "a crop" not in said
    photos = Path(shutil.copytree(photos, tmp_path / "photos"))
    first, second, *rest = sorted(photos.iterdir())
    first.with_suffix(".txt").write_text("a dog")
    line = f'{{"file_name": "{second.name}", "text": "a dog", "crop": [0, 0, 9, 9]}}'
    (photos / "captions.jsonl").write_text(line)
    Image.new("L", (64, 64), 255).save(photos / f"{first.stem}.mask.png")
    write_config(tmp_path / "b.toml", str(photos), "dog", MODEL, "pkblz")
    said, count = capfd.readouterr().err, len(rest) + 2
    assert "96 x 96 is small: enlarged 5.3 times to 512" in said
    assert f"2 of {count} photos have captions, which go before subject.prompts" in said
    assert f"1 of {count} photos have a crop" in said and f"1 of {count} photos have a mask; what it hides" in said
    (photos / "captions.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"captions\.jsonl: line 1: .*; mend the line, or remove it$"):
        write_config(tmp_path / "c.toml", str(photos), "dog", MODEL, "pkblz")
    assert not (tmp_path / "c.toml").exists()


@pytest.mark.parametrize(
    "word", ['say "hi"', "back\\slash", "naïve 🪼", "{brace", "C:\\new\\tests", "two\nlines", "\x7f"]
)
def test_odd_words_survive(photos, tmp_path, word):
    write_config(tmp_path / "odd.toml", str(photos), word, MODEL, "pkblz")
    assert load(tmp_path / "odd.toml").subject.class_noun == word


def test_a_path_of_windows_loads_as_it_was_given(photos, tmp_path):
    write_config(tmp_path / "dog.toml", str(photos), "dog", "C:\\Users\\new\\a model", "pkblz")
    assert load(tmp_path / "dog.toml").model.name == "C:\\Users\\new\\a model"


@pytest.mark.parametrize("name", ["my dog", "jelly (1)", "Hund & Katze", "dog's", "🐶", "-x"])
def test_any_name_can_be_a_runs_and_its_command_can_be_pasted(photos, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = Path(f"{name}.toml")
    write_config(path, str(photos), "dog", MODEL, "pkblz")
    assert load(path).output.name == name
    if os.name != "nt":
        program, command, word = shlex.split(train_command(path))
        assert (program, command, Path(word)) == ("lowvram-db", "train", path) and not word.startswith("-")
    assert train_command(path) in path.read_text(encoding="utf-8").splitlines()[0]


@pytest.mark.parametrize("name", ["", ".", "..", "a\nb", "what?", "nul", "dog ", "d" * 256, "\udcff"])
def test_a_name_that_can_be_no_folders_is_refused(photos, tmp_path, name):
    with pytest.raises(UserError, match=r"^NAME: .*; choose another name$"):
        write_config(tmp_path / f"{name}.toml", str(photos), "dog", MODEL, "pkblz")
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(photos, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("precious")
    with pytest.raises(UserError, match=r"mine\.toml: exists already"):
        write_config(path, str(photos), "dog", MODEL, "pkblz")
    assert path.read_text() == "precious"


def test_bad_photos_and_words_are_refused_before_writing(photos, tmp_path):
    with pytest.raises(UserError, match=r"--photos: .* does not exist"):
        write_config(tmp_path / "a.toml", str(tmp_path / "none"), "dog", MODEL, "pkblz")
    with pytest.raises(UserError, match=r"subject\.identifier: must not be empty"):
        write_config(tmp_path / "a.toml", str(photos), "dog", MODEL, " ")
    assert not (tmp_path / "a.toml").exists()


def test_a_model_in_the_hubs_cache_is_at_hand(photos, miniature, tmp_path, monkeypatch, capfd):
    """As the hub's library lays one out, and without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("somebody/kept", "somebody/else"):
        write_config(tmp_path / f"{name[-4:]}.toml", str(photos), "ball", name)
        assert "identifier" not in capfd.readouterr().err, "nothing is known of its words"
        stored = tmp_path / "hub" / "models--somebody--kept"
        if not stored.exists():
            shutil.copytree(miniature, stored / "snapshots" / "0123")
            (stored / "refs").mkdir()
            (stored / "refs" / "main").write_text("0123")
    write_config(tmp_path / "now.toml", str(photos), "ball", "somebody/kept")
    local = tmp_path / "local.toml"
    write_config(local, str(photos), "ball", str(miniature))
    assert load(tmp_path / "now.toml").subject == load(local).subject
    first, second = re.findall(r"^identifier .*$", capfd.readouterr().err, re.M)
    assert first == second
