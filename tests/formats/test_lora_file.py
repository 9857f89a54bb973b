"""LoRA files as people have them, read by the command that needs them: `lowvram-db merge`."""

import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lowvram_db.demo.miniature import write_sdxl
from lowvram_db.formats.export import describe_lora
from lowvram_db.formats.lora_file import LowRank, read_lora, write_lora
from lowvram_db.formats.stored import open_stored

QUERY = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
STEM = f"lora_unet_{QUERY.replace('.', '_')}"
DOWN, UP, ALPHA = (f"{STEM}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha"))
PROJECTION = "encoder.layers.0.self_attn.q_proj"


def low_rank(shape, rank=4, alpha=2.0):
    kernel = [1] * (len(shape) - 2)
    return LowRank(torch.randn(rank, *shape[1:]), torch.randn(shape[0], rank, *kernel), alpha)


@pytest.fixture
def lora():
    torch.manual_seed(0)
    return {
        ("unet", QUERY): low_rank((64, 64)),
        ("unet", "conv_in"): low_rank((32, 4, 3, 3)),
        ("text_encoder", PROJECTION): low_rank((32, 32)),
    }


@pytest.fixture
def file(tmp_path, lora):
    write_lora(tmp_path / "lora.safetensors", "sd1", lora, torch.float32, {})
    return tmp_path / "lora.safetensors"


@pytest.fixture
def refused(lowvram_db, tmp_path, capfd):
    """`merge` ends in one line, with these words, and leaves nothing."""

    def check(model, lora, *parts):
        before = set(tmp_path.rglob("*"))
        capfd.readouterr()
        code, out, err = lowvram_db("merge", model, lora, "--out", tmp_path / "merged")
        assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("error: "), err
        assert all(part in err for part in parts), err
        assert set(tmp_path.rglob("*")) == before

    return check


def equal(one, other):
    assert one.keys() == other.keys()
    for layer, low in one.items():
        assert torch.equal(low.down, other[layer].down) and torch.equal(low.up, other[layer].up)
        assert low.alpha == other[layer].alpha


def moved(tensors, new, old=STEM):
    for key in [key for key in tensors if key.startswith(old)]:
        tensors[new + key.removeprefix(old)] = tensors.pop(key)


# What a change makes of the good file, and what is said of it.
SPOILT = {
    "DoRA": (lambda t: t.update({f"{STEM}.dora_scale": torch.ones(64)}), "is a DoRA, whose magnitudes"),
    "DoRA by peft": (lambda t: t.update({"unet.x.lora_magnitude_vector": torch.ones(4)}), "is a DoRA"),
    "LoHa": (lambda t: t.update({f"{STEM}.hada_w1_a": torch.ones(64, 4)}), "is a LoHa, no LoRA"),
    "LoKr": (lambda t: t.update({f"{STEM}.lokr_w1": torch.ones(8, 8)}), "is a LoKr, no LoRA"),
    "OFT": (lambda t: t.update({f"{STEM}.oft_blocks": torch.ones(4, 4)}), "is an OFT adapter"),
    "Tucker": (lambda t: t.update({f"{STEM}.lora_mid.weight": torch.ones(4, 4, 3, 3)}), "of Tucker's form"),
    "a bias": (lambda t: t.update({f"{STEM}.diff_b": torch.ones(64)}), "diff_b, which is no part of a LoRA"),
    "NaN": (lambda t: t[UP][3].fill_(torch.nan), f"{STEM}.lora_up.weight holds numbers"),
    "infinity": (lambda t: t[ALPHA].fill_(torch.inf), f"{STEM}.alpha holds numbers that are not finite"),
    "two alphas": (lambda t: t.update({ALPHA: torch.ones(2)}), "alpha is not one number"),
    "rank 0": (
        lambda t: t.update({DOWN: t[DOWN][:0], UP: t[UP][:, :0]}),
        f"{STEM} has a rank of 0",
    ),
    "no up": (lambda t: t.pop(UP), "lora_down.weight and no lora_unet_mid"),
    "no down": (lambda t: t.pop(DOWN), "lora_up.weight and no lora_unet_mid"),
    "wider": (
        lambda t: t.update({DOWN: torch.ones(4, 32)}),
        f"{STEM} changes a layer of 64 x 32, the model's is 64 x 64; it was made for another kind of model",
    ),
    "ranks that differ": (lambda t: t.update({DOWN: torch.ones(8, 64)}), "another kind of model"),
    "a number": (lambda t: t.update({UP: torch.tensor(1.0)}), "has 0 dimensions, not 2 or 4"),
    "one dimension": (lambda t: t.update({DOWN: torch.ones(64)}), "has 1 dimensions"),
    "another layer": (lambda t: moved(t, "lora_unet_mid_block_made_up"), "changes lora_unet_mid_block_made_up"),
    "a norm": (lambda t: moved(t, f"lora_unet_{QUERY[:41]}_norm1".replace(".", "_")), "which the model has not"),
    "SDXL's second encoder": (
        lambda t: moved(t, f"lora_te2_text_model_{PROJECTION}".replace(".", "_")),
        "changes text_encoder_2, which the model has not; it is for one of sdxl",
    ),
    "one layer by two names": (
        lambda t: t.update(
            {
                f"unet.{QUERY}.lora_A.weight": t[DOWN] + 1,
                f"unet.{QUERY}.lora_B.weight": t[UP] + 1,
            }
        ),
        f"changes unet.{QUERY} twice",
    ),
    "a part of a model": (lambda t: (t.clear(), t.update({"encoder.conv_in.weight": torch.ones(4)})), "a VAE alone"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_what_cannot_be_merged_is_named_in_one_line(case, file, miniature, refused):
    change, message = SPOILT[case]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    refused(miniature, file, "lora.safetensors: ", message)


def test_what_is_no_file_of_a_lora_is_named(file, miniature, refused, tmp_path):
    refused(miniature, tmp_path / "nowhere.safetensors", "nowhere.safetensors: no such file; name a LoRA")
    refused(miniature, tmp_path, "is a folder; name a LoRA")
    refused(
        miniature, miniature / "unet" / "diffusion_pytorch_model.safetensors", "a UNet alone", "a LoRA was expected"
    )
    file.write_bytes(file.read_bytes()[:-100])
    refused(miniature, file, "damaged, or was not downloaded to its end")
    file.write_text("<html>")
    refused(miniature, file, "lora.safetensors: ")


def test_a_model_without_the_part_that_is_changed_is_named(file, miniature, refused, tmp_path):
    model = shutil.copytree(miniature, tmp_path / "model")
    shutil.rmtree(model / "text_encoder")
    refused(model, file, "text_encoder")
    write_sdxl(tmp_path / "sdxl")
    refused(tmp_path / "sdxl", file, "changes lora_te_text_model", "which the model has not")


@pytest.mark.parametrize(
    "words",
    [
        ("merge", "LORA", "LORA", "--out", "out"),
        ("export", "LORA", "--out", "out.safetensors"),
        ("export", "MODEL", "--format", "lora", "--rank", "4", "--base", "LORA", "--out", "out.safetensors"),
        ("sample", "LORA", "--prompt", "a ball"),
        ("train", "TOML"),
        ("plan", "TOML"),
    ],
)
def test_a_lora_given_as_the_model_is_named(words, file, miniature, make_config, lowvram_db, tmp_path):
    toml = tmp_path / "ball.toml"
    toml.write_text(make_config(model={"name": str(file)}).to_toml(), encoding="utf-8")
    places = {"LORA": file, "MODEL": miniature, "TOML": toml}
    code, out, err = lowvram_db(*(places.get(word, word) for word in words))
    assert (code, out) == (2, "")
    assert "lora.safetensors: is a LoRA or another adapter, which changes a model and is none" in err
    assert err.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "0"], "--rank 0: must be at least 1"),
        ([], "--rank: is missing"),
        (["--rank", "4"], "is no run, which would know its base model; name that with --base"),
        (["--rank", "4", "--base", "MODEL"], "--base: is the same as the model"),
    ],
)
def test_a_lora_that_cannot_be_taken_out_is_refused(options, message, miniature, lowvram_db, tmp_path):
    words = [miniature if word == "MODEL" else word for word in options]
    code, out, err = lowvram_db("export", miniature, "--format", "lora", "--out", "out.safetensors", *words)
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("weight", ["nan", "inf"])
def test_a_weight_that_is_no_number_is_refused(weight, file, miniature, lowvram_db):
    code, out, err = lowvram_db("merge", miniature, file, "--weight", weight, "--out", "merged")
    assert (code, out, err) == (2, "", f"error: --weight {weight}: must be a number, for example 0.8\n")


def test_another_base_is_told_by_name_and_its_own_is_not(lora, miniature, lowvram_db, tmp_path):
    with open_stored(str(miniature)) as base:
        said = describe_lora(base, "lora", torch.float32, "models/ball-v2", None)
    del lora["unet", "conv_in"]
    write_lora(
        tmp_path / "lora.safetensors", "sd1", {("unet", "conv_out"): low_rank((4, 32, 3, 3))}, torch.float32, said
    )
    other = shutil.copytree(miniature, tmp_path / "other")
    unet = other / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(unet)
    tensors["conv_in.bias"] += 1
    save_file(tensors, unet, {"format": "pt"})
    assert lowvram_db("merge", miniature, "lora.safetensors", "--out", "own")[::2] == (0, "")
    code, _, err = lowvram_db("merge", other, "lora.safetensors", "--out", "merged")
    assert code == 0 and err.count("\n") == 1
    assert f"lora.safetensors: was not made for {other} but for ball-v2, or that has been changed" in err


@pytest.mark.parametrize("out", ["merged", "merged.safetensors"])
def test_what_float16_cannot_hold_is_written_in_float32_and_said(out, file, write_folder, lowvram_db, tmp_path):
    """The base is in float16, in which the sum is larger than any number."""
    torch.manual_seed(0)
    layer = "down_blocks.0.resnets.0.conv1"
    model = write_folder("sd1")
    shape = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")[f"{layer}.weight"].shape
    write_lora(file, "sd1", {("unet", layer): low_rank(tuple(shape))}, torch.float32, {})
    code, _, err = lowvram_db("merge", model, file, "--weight", "1e5", "--out", out)
    assert code == 0 and "unet: 1 of its tensors hold numbers too large for float16; it is written in float32" in err
    found = tmp_path / out
    with safe_open(found if found.is_file() else next(found.glob("unet/*.safetensors")), framework="pt") as written:
        tensors = list(map(written.get_tensor, written.keys()))
    assert all(tensor.isfinite().all() for tensor in tensors)
    assert max(tensor.abs().max() for tensor in tensors if tensor.is_floating_point()) > 7e4


def test_a_lora_too_large_for_float16_is_written_in_float32_and_said(miniature, lowvram_db, tmp_path):
    tuned = shutil.copytree(miniature, tmp_path / "tuned")
    unet = tuned / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(unet)
    tensors["conv_out.weight"] += 1e12
    save_file(tensors, unet, {"format": "pt"})
    options = ["--format", "lora", "--rank", "2", "--base", miniature, "--out", "lora.safetensors"]
    code, _, err = lowvram_db("export", tuned, *options)
    assert code == 0 and err == "lora.safetensors: holds numbers too large for float16; it is saved in float32\n"
    written = load_file(tmp_path / "lora.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in written.values())


def test_every_layout_is_read_as_the_same(lora, file, miniature, tmp_path):
    """kohya's by diffusers' names and by the original code's, peft's, and what diffusers had before."""
    tensors = load_file(file)
    layouts = {
        "original": {f"lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q{end}": tensors[STEM + end] for end in (
            ".lora_down.weight", ".lora_up.weight", ".alpha")},
        "peft": {
            f"unet.{QUERY}.lora_A.weight": tensors[DOWN],
            f"unet.{QUERY}.lora_B.weight": tensors[UP],
            f"unet.{QUERY}.alpha": torch.tensor(2.0),
        },
        "before": {
            f"unet.{QUERY}.lora.down.weight": tensors[DOWN],
            f"unet.{QUERY}.lora.up.weight": tensors[UP],
            f"unet.{QUERY}.alpha": torch.tensor(2.0),
        },
    }  # fmt: skip
    with open_stored(str(miniature)) as model:
        equal(read_lora(file, model, "m"), lora)
        for name, layout in layouts.items():
            save_file(layout, tmp_path / f"{name}.safetensors")
            equal(read_lora(tmp_path / f"{name}.safetensors", model, "m"), {("unet", QUERY): lora["unet", QUERY]})


@pytest.mark.parametrize(("alpha", "said"), [(6, 6.0), (None, 4.0)])
def test_a_file_of_diffusers_own_has_its_alpha_in_the_header(alpha, said, miniature, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(miniature)
    pipeline.unet.add_adapter(LoraConfig(r=4, lora_alpha=alpha or 4, target_modules=["to_q", "conv_in"]))
    config = {"unet_lora_adapter_metadata": pipeline.unet.peft_config["default"].to_dict()} if alpha else {}
    weights = get_peft_model_state_dict(pipeline.unet)
    pipeline.save_lora_weights(tmp_path, unet_lora_layers=weights, **config)
    with open_stored(str(miniature)) as model:
        found = read_lora(tmp_path / "pytorch_lora_weights.safetensors", model, "m")
    assert {layer for _, layer in found} == {key.removesuffix(".lora_A.weight") for key in weights if "_A." in key}
    assert {low.alpha for low in found.values()} == {said}
