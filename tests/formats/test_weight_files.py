import json

import pytest

from lowvram_db.errors import UserError
from lowvram_db.files.stand_in import refuse_stand_in
from lowvram_db.formats.weight_files import weight_files

DIFFUSERS = "diffusion_pytorch_model"


def write(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"weights")


def names(folder, part):
    return [file.name for file in weight_files(folder, part)]


def test_the_format_s_own_name_is_read_and_nothing_beside_it(tmp_path):
    write(tmp_path / "unet", "model.safetensors", f"{DIFFUSERS}_old.safetensors", f"{DIFFUSERS}.fp16.safetensors")
    with pytest.raises(UserError, match=rf"unet: no weights there by the name of {DIFFUSERS}\.safetensors"):
        weight_files(tmp_path, "unet")
    write(tmp_path / "unet", f"{DIFFUSERS}.bin")
    assert names(tmp_path, "unet") == [f"{DIFFUSERS}.bin"]
    write(tmp_path / "unet", f"{DIFFUSERS}.safetensors")
    assert names(tmp_path, "unet") == [f"{DIFFUSERS}.safetensors"]
    write(tmp_path / "text_encoder", f"{DIFFUSERS}.safetensors", "pytorch_model.bin")
    assert names(tmp_path, "text_encoder") == ["pytorch_model.bin"]
    write(tmp_path / "text_encoder", "model.safetensors")
    assert names(tmp_path, "text_encoder") == ["model.safetensors"]


@pytest.mark.parametrize(
    ("part", "stem", "wanted"),
    [("vae", DIFFUSERS, ["one.safetensors", "two.safetensors"]), ("text_encoder", "model", ["model.safetensors"])],
)
def test_an_index_beside_a_single_file(tmp_path, part, stem, wanted):
    """diffusers' loader takes the shards then, transformers' the file."""
    write(tmp_path / part, f"{stem}.safetensors", "one.safetensors", "two.safetensors", "three.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "two.safetensors", "b": "one.safetensors", "c": "two.safetensors"}}
    (tmp_path / part / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    assert names(tmp_path, part) == wanted


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("{", "cannot be read"),
        ("[]", "not a JSON object"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": ["one.safetensors"]}', "has no weight_map"),
        ('{"weight_map": {"a": "three.safetensors"}}', "names 'three.safetensors', which is missing"),
        ('{"weight_map": {"a": ""}}', "names '', which is missing"),
        ('{"weight_map": {"a": ".."}}', "names '..', which is missing"),
        ('{"weight_map": {"a": "one\\u0000"}}', "which is missing"),
        ('{"weight_map": {"a": 5}}', "names '5', which is missing"),
        ('{"weight_map": {"a": "../vae/one.safetensors"}}', "a file outside its folder"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "a file outside its folder"),
        ('{"weight_map": {"a": "..\\\\one.safetensors"}}', "a file outside its folder"),
    ],
)
def test_an_index_that_does_not_lead_to_files_of_the_folder_is_named(tmp_path, index, words):
    write(tmp_path / "unet", "one.safetensors")
    (tmp_path / "unet" / f"{DIFFUSERS}.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=rf"index\.json: .*{words}"):
        weight_files(tmp_path, "unet")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "is a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>Sign in</html>", "is a web page"),
        (b"<html lang=en>", "is a web page"),
        (b"", "is empty"),
        (b" \n", "is empty"),
    ],
)
def test_what_only_stands_in_for_weights_is_called_what_it_is(tmp_path, content, words):
    write(tmp_path / "vae", f"{DIFFUSERS}.safetensors")
    refuse_stand_in(tmp_path / "vae" / f"{DIFFUSERS}.safetensors")
    (tmp_path / "vae" / f"{DIFFUSERS}.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=rf"vae/{DIFFUSERS}\.safetensors: {words}"):
        weight_files(tmp_path, "vae")
