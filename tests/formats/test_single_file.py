import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowvram_db.dreambooth import run_dreambooth
from lowvram_db.errors import UserError
from lowvram_db.families import open_model
from lowvram_db.formats import kinds
from lowvram_db.formats.content import ema_key
from lowvram_db.formats.known import family_folder
from lowvram_db.formats.layout import LAYOUTS, VAE_PREFIX
from lowvram_db.formats.source import find_configs, find_model
from lowvram_db.reading import STAND_IN, Reading

EPSILON = {"sd1": None, "sd2": "epsilon", "sdxl": None}


@pytest.fixture
def opened(letters):
    """The folder that stands for a file."""

    def open_file(file, **reading):
        return find_model(str(file), reading=Reading(**{"tokenizer": str(letters), **reading}))

    return open_file


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def seeded(networks, kind):
    """What write_file has put into its file."""
    torch.manual_seed(0)
    return {part: network.state_dict() for part, network in networks(kind).items()}


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
@pytest.mark.parametrize("kind", EPSILON)
def test_every_network_comes_out_of_the_file_bit_for_bit(kind, name, write_file, networks, opened, weights):
    folder = opened(write_file(kind, name, dtype=torch.float32), prediction_type=EPSILON[kind])
    for part, wanted in seeded(networks, kind).items():
        assert same(weights(folder, part), wanted), part


@pytest.mark.parametrize("kind", LAYOUTS)
def test_true_sizes_get_the_config_files_of_the_package(kind, listed, hollow, tmp_path):
    held, others = listed(kind)
    file = hollow(tmp_path / "model.safetensors", held | others)
    folder = find_configs(str(file), reading=Reading("v_prediction"))
    for part in LAYOUTS[kind]:
        config, packaged = (json.loads((at / part / "config.json").read_text()) for at in (folder, family_folder(kind)))
        assert config.items() >= packaged.items(), part
        assert {key: config[key] for key in config.keys() - packaged.keys()}.items() <= NOT_IN_THE_PACKAGE.items()


NOT_IN_THE_PACKAGE = {"layers_per_block": 2, "latent_channels": 4}  # what diffusers takes where a config is silent


def test_a_run_trains_from_a_file_draws_and_goes_on_from_a_renamed_one(write_file, letters, make_config):
    file = write_file()
    before = file.read_bytes()
    model, alone = {"name": str(file), "tokenizer": str(letters)}, {"prior": {"enabled": False}}
    config = make_config(model=model, train={"steps": 1}, sample={"prompts": ["a {identifier}"]}, **alone)
    run = run_dreambooth(config)
    base, trained = open_model(str(file), reading=config.model.reading), open_model(str(run.model))
    assert same(trained.load_vae().state_dict(), base.load_vae().state_dict())
    assert not same(trained.load_denoiser().state_dict(), base.load_denoiser().state_dict())
    assert run.sample_grid(1).exists() and file.read_bytes() == before

    moved, other = file.rename(file.with_name("renamed.safetensors")), write_file(name="other.safetensors", seed=1)
    with pytest.raises(UserError, match="another base model"):
        run_dreambooth(make_config(model=model | {"name": str(other)}, train={"steps": 2}, **alone))
    run_dreambooth(make_config(model=model | {"name": str(moved)}, train={"steps": 2}, **alone))
    assert run.sample_grid(2).exists()


def digests(folder):
    return {part.parent.name: part.read_text() for part in folder.glob(f"*/{STAND_IN}")}


def test_the_same_part_of_two_files_is_the_same(write_file, opened, networks, tmp_path):
    """Whatever else is in the files, and in whichever layout the part is stored."""

    def other_unet(tensors):
        tensors["model.diffusion_model.out.2.bias"] += 1
        tensors["extra"] = torch.ones(3)

    one, other = write_file(), write_file(name="other.safetensors", change=other_unet)
    first, second = digests(opened(one)), digests(opened(other))
    assert {part for part in first if first[part] != second[part]} == {"unet"}
    vae = {key.removeprefix(VAE_PREFIX): t for key, t in load_file(one).items() if key.startswith(VAE_PREFIX)}
    save_file(vae, tmp_path / "vae.safetensors")
    networks_vae = networks("sd1")["vae"]
    torch.manual_seed(0)
    networks_vae.load_state_dict(seeded(networks, "sd1")["vae"])
    networks_vae.half().save_pretrained(tmp_path / "folder" / "vae")
    for named in ("vae.safetensors", "folder", "folder/vae"):
        assert digests(opened(other, vae=str(tmp_path / named)))["vae"] == first["vae"]


def without(prefix):
    def change(tensors):
        for key in [key for key in tensors if key.startswith(prefix)]:
            del tensors[key]

    return change


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_missing_network_is_asked_for_and_taken_out_of_another_model(kind, write_file, opened, monkeypatch):
    """A UNet alone, as trainings leave one, beside the model that it was trained on."""
    monkeypatch.setattr(kinds, "_FAMILIES_BY_CONTEXT", {192 if kind == "sdxl" else 64: kind})  # of the miniatures
    whole, speaks = write_file(kind), {"prediction_type": EPSILON[kind]}
    others = [part for part in LAYOUTS[kind] if part != "unet"]
    lacking = [LAYOUTS[kind][part].prefix for part in others]
    bare, named = write_file(kind, "bare.safetensors", change=without(tuple(lacking))), {}
    for part in others:
        with pytest.raises(UserError, match=rf'bare\.safetensors: has no {part}.*; name .*, model\.{part} = "'):
            opened(bare, **named, **speaks)
        named[part] = str(whole)
    assert digests(opened(bare, **named, **speaks)) == digests(opened(whole, **speaks))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_network_is_taken_out_of_a_folder_and_out_of_a_file_of_its_own(
    kind, write_file, write_folder, opened, tmp_path
):
    """By transformers' names, with the prefix and without, and with what whole models of CLIP have beside it."""
    reading, folder = {"prediction_type": EPSILON[kind]}, write_folder(kind)
    own, other = digests(opened(write_file(kind), **reading)), write_file(kind, "other.safetensors", seed=1)
    for part in set(LAYOUTS[kind]) - {"unet"}:
        (stored,) = (folder / part).glob("*.safetensors")
        state = load_file(stored)
        if part.startswith("text_encoder"):
            layers = "text_model.encoder.layers."
            state = {name if name.startswith("text_") else f"text_model.{name}": t for name, t in state.items()}
            if kind == "sd2":  # as OpenCLIP's own model has a layer more
                last = [name for name in state if name.startswith(f"{layers}1.")]
                state |= {name.replace(f"{layers}1.", f"{layers}2."): state[name] + 1 for name in last}
            if part == "text_encoder":
                state["text_projection.weight"] = torch.ones(64, 64)
            beside = {"logit_scale": torch.ones(1), "text_model.embeddings.position_ids": torch.arange(77)[None]}
            save_file(state | beside, tmp_path / "whole.safetensors")
            save_file({name.removeprefix("text_model."): t for name, t in state.items()}, tmp_path / "own.safetensors")
        else:
            save_file(state, tmp_path / "whole.safetensors")
            save_file({f"vae.{key}": t for key, t in bare_vae(write_file(kind)).items()}, tmp_path / "own.safetensors")
        for place in (folder, folder / part, tmp_path / "whole.safetensors", tmp_path / "own.safetensors"):
            assert digests(opened(other, **{part: str(place)}, **reading))[part] == own[part], place
        assert digests(opened(other, **reading))[part] != own[part]


def bare_vae(file):
    return {key.removeprefix(VAE_PREFIX): t for key, t in load_file(file).items() if key.startswith(VAE_PREFIX)}


PARTS = {"vae": "VAE", "text_encoder": "text encoder", "text_encoder_2": "second text encoder"}


@pytest.mark.parametrize("part", PARTS)
def test_what_has_no_such_network_is_named_with_the_key(part, write_file, write_folder, opened, weights, tmp_path):
    file = write_file("sdxl")
    save_file({"a": torch.ones(1)}, tmp_path / "nothing.safetensors")
    (found,) = (write_folder("sdxl") / part).rename(tmp_path / "part").glob("*.safetensors")
    save_file(load_file(found) | {"encoder.down_blocks.made_up": torch.ones(1)}, tmp_path / "more.safetensors")
    for name, words in {
        "nowhere": "no file or folder",
        "folder": r"holds no (diffusion_pytorch_)?model\.safetensors",
        "nothing.safetensors": f"has no {PARTS[part]} of",
        "more.safetensors": "made_up, which (no|a network)",
    }.items():
        with pytest.raises(UserError, match=rf"{words}") as refused:
            weights(opened(file, **{part: str(tmp_path / name)}), part)
        assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match=r"model\.text_encoder_2: .* is Stable Diffusion 1\.x, which has none"):
        opened(write_file("sd1"), text_encoder_2=str(file))


def test_averaged_weights_are_taken_where_they_are_asked_for(write_file, opened, networks, weights):
    def with_ema(tensors):
        unet = {key: t for key, t in tensors.items() if key.startswith("model.diffusion_model.")}
        tensors |= {ema_key(key): tensor + 1 for key, tensor in unet.items()}

    assert ema_key("model.diffusion_model.input_blocks.0.0.weight") == "model_ema.diffusion_modelinput_blocks00weight"
    file = write_file(dtype=torch.float32, change=with_ema)
    wanted = seeded(networks, "sd1")["unet"]
    assert same(weights(opened(file), "unet"), wanted)
    assert same(weights(opened(file, ema=True), "unet"), {name: tensor + 1 for name, tensor in wanted.items()})
    with pytest.raises(UserError, match=r"model\.ema: .* has no averaged weights"):
        opened(write_file(), ema=True)


def test_old_names_of_clip_are_read(write_file, opened, networks, weights):
    """Merges of former years lack `text_model.`; and position_ids may be anything."""

    def old(tensors):
        for key in [key for key in tensors if ".text_model." in key]:
            tensors[key.replace(".text_model.", ".")] = tensors.pop(key)
        tensors["cond_stage_model.transformer.embeddings.position_ids"] = torch.arange(77)[None].half() + 0.5

    folder = opened(write_file(dtype=torch.float32, change=old))
    assert same(weights(folder, "text_encoder"), seeded(networks, "sd1")["text_encoder"])


LAYER = "cond_stage_model.model.transformer.resblocks."


@pytest.mark.parametrize("whole", [True, False])
def test_the_last_text_layer_of_sd_2_is_unheard_where_there_is_a_projection(
    whole, write_file, opened, networks, weights
):
    def change(tensors):
        if whole:  # the network's two layers and one more
            for key in [key for key in tensors if key.startswith(f"{LAYER}1.")]:
                tensors[key.replace(f"{LAYER}1.", f"{LAYER}2.")] = torch.zeros_like(tensors[key])
            tensors["cond_stage_model.model.text_projection"] = torch.eye(64)
            tensors["cond_stage_model.model.logit_scale"] = torch.tensor(4.6)

    folder = opened(write_file("sd2", dtype=torch.float32, change=change), prediction_type="epsilon")
    assert same(weights(folder, "text_encoder"), seeded(networks, "sd2")["text_encoder"])


def spoiled(key, value):
    def change(tensors):
        tensors[key] = tensors[key].clone()
        tensors[key].view(-1)[0] = value

    return change


OUT = "model.diffusion_model.out.2.weight"
REFUSED = {
    "fp8": (lambda t: t.update({OUT: t[OUT].to(torch.float8_e4m3fn)}), rf"{OUT} is stored as F8_E4M3"),
    "integers": (lambda t: t.update({OUT: t[OUT].to(torch.int8)}), rf"{OUT} is stored as I8"),
    "a tensor of another UNet": (
        lambda t: t.update({"model.diffusion_model.middle_block.3.0.weight": torch.ones(1)}),
        r"has model\.diffusion_model\.middle_block\.3\.0\.weight, which no UNet of Stable Diffusion 1\.x has",
    ),
    "without a block": (without("model.diffusion_model.output_blocks.0."), "no network|has no tensor|cannot be"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_named_with_the_file(case, write_file, opened, weights):
    change, words = REFUSED[case]
    file = write_file(change=change)
    with pytest.raises(UserError, match=words) as refused:
        weights(opened(file), "unet")
    assert str(refused.value).startswith(str(file)) and "\n" not in str(refused.value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_no_number_is_named_as_the_file_calls_it(value, write_file, opened, weights):
    file = write_file(change=spoiled(OUT, value))
    with pytest.raises(UserError, match=rf"model\.safetensors: {OUT} holds numbers that are not finite"):
        weights(opened(file), "unet")


class Runs:
    def __reduce__(self):
        return (print, ("code was run",))


def test_a_pickle_that_wants_to_run_code_is_not_opened(tmp_path, opened, capfd):
    torch.save({"state_dict": {"a": torch.ones(1)}, "callbacks": Runs()}, tmp_path / "model.ckpt")
    with pytest.raises(UserError, match=r"model\.ckpt: a pickle that wants to run \S*print is not opened"):
        opened(tmp_path / "model.ckpt")
    (tmp_path / "old.ckpt").write_bytes(pickle.dumps(Runs()))
    with pytest.raises(
        UserError, match=r"old\.ckpt: a damaged pickle, or one of more than tensors, is not opened; get"
    ):
        opened(tmp_path / "old.ckpt")
    said = capfd.readouterr()
    assert "code was run" not in said.out and "Warning" not in said.err


def test_a_training_s_ckpt_is_read_without_what_is_around_its_tensors(write_file, opened, networks, tmp_path, weights):
    file = write_file(name="plain.ckpt", dtype=torch.float32)
    tree = {"state_dict": torch.load(file), "epoch": 3, "optimizer_states": [{"lr": 1.0}]}
    torch.save(tree, tmp_path / "model.ckpt")
    assert same(weights(opened(tmp_path / "model.ckpt"), "unet"), seeded(networks, "sd1")["unet"])


_OPEN = """
from pathlib import Path
import torch
from lowvram_db.cache import catalogue_of, model_digest
from lowvram_db.families import open_model
from lowvram_db.reading import Reading
def load(name):
    family = open_model(name, reading=Reading(tokenizer=sys.argv[3]))
    model_digest(family, catalogue_of(Path(name).parent / "catalogue"))
    for part in (family.load_text_encoders, family.load_vae):
        part()
    return family.load_denoiser(lambda weight: weight.to(torch.bfloat16))
load(sys.argv[2])
"""


def test_loading_holds_one_network_and_little_more(growth, wide_file, write_file, letters):
    """Of what a run does before it trains; whatever else is in the file."""
    assert growth(_OPEN, "denoiser = load(sys.argv[1])", wide_file, write_file(), letters) < 148 + 130  # MiB


def test_a_file_that_changes_after_it_was_opened_is_named(write_file, opened, weights):
    file = write_file()
    folder = opened(file)
    shutil.copy(write_file(name="other.safetensors", seed=1), file)
    with pytest.raises(UserError, match=r"model\.safetensors: has changed since"):
        weights(folder, "unet")
    assert digests(opened(file)) != digests(folder), "opened anew it is another model"


def test_what_is_said_of_a_single_file_means_nothing_to_a_folder(miniature):
    for key, value in {"ema": True, "vae": "x", "tokenizer": "x"}.items():
        with pytest.raises(UserError, match=rf"model\.{key}: .* is no single file"):
            find_configs(str(miniature), reading=Reading(**{key: value}))
