import re
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from lowvram_db.errors import UserError
from lowvram_db.families import open_model
from lowvram_db.optim.adam8 import Adam8
from lowvram_db.optim.storage import SMALLEST, narrowing


def test_weights_come_as_diffusers_reads_them(family, miniature):
    theirs = UNet2DConditionModel.from_pretrained(miniature, subfolder="unet", dtype=torch.float32)
    ours = family.load_denoiser()
    assert not ours.training and not any(p.is_meta for p in [*ours.parameters(), *ours.buffers()])
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name


def test_pickled_weights_are_narrowed_too(copy, family):
    wanted = family.load_denoiser(narrowing("bf16")).state_dict()
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(family.load_denoiser().state_dict(), copy / "unet" / "diffusion_pytorch_model.bin")
    loaded = open_model(str(copy)).load_denoiser(narrowing("bf16")).state_dict()
    assert all(
        torch.equal(tensor, wanted[name]) and tensor.dtype == wanted[name].dtype for name, tensor in loaded.items()
    )


@pytest.mark.parametrize("weights", ["bf16", "bf16+residual", "fp16", "fp32"])
def test_an_optimizer_finds_every_bit_it_keeps(family, weights):
    """Narrowed while read or by the optimizer: the same weights, the same state."""
    narrowed, whole = family.load_denoiser(narrowing(weights)), family.load_denoiser()
    if weights == "bf16":
        kept = {p.dtype for p in narrowed.parameters() if p.numel() < SMALLEST}
        assert kept == {torch.float32}
        assert {p.dtype for p in narrowed.parameters() if p.numel() >= SMALLEST} == {torch.bfloat16}
    optimizers = [Adam8(model.named_parameters(), weights=weights) for model in (narrowed, whole)]
    for optimizer in optimizers:
        optimizer.finish()
    for (name, p), q in zip(narrowed.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(p, q), name


LOADERS = {
    "unet": lambda family: family.load_denoiser(),
    "vae": lambda family: family.load_vae(),
    "text_encoder": lambda family: family.load_text_encoders()["text_encoder"],
}
PARTS = sorted(LOADERS)


def load(folder, part):
    return LOADERS[part](open_model(str(folder)))


def refused(use, *how):
    with pytest.raises(UserError) as error:
        use(*how)
    assert "\n" not in str(error.value)
    return str(error.value)


def first(tensors):
    """A tensor's name, and the others."""
    name = min(name for name in tensors if tensors[name].ndim == 2)
    return name, {other: tensor for other, tensor in tensors.items() if other != name}


CHANGES = {
    "missing": (lambda tensor: {}, "has no tensor"),
    "renamed": (lambda tensor: {"_orig_mod": tensor}, "has a tensor _orig_mod, which a network of config.json has not"),
    "transposed": (lambda tensor: {"": tensor[:1].T}, "is [0-9]+ x 1, by config.json"),
    "NaN": (lambda tensor: {"": tensor.index_fill(0, torch.tensor([1]), torch.nan)}, "not finite"),
    "infinite": (lambda tensor: {"": tensor.index_fill(1, torch.tensor([0]), -torch.inf)}, "not finite"),
    "too large for float32": (lambda tensor: {"": tensor.double() + 1e300}, "not finite"),
    "8-bit": (lambda tensor: {"": tensor.to(torch.float8_e4m3fn)}, "is stored as float8_e4m3fn"),
    "quantized": (lambda tensor: {"": tensor.to(torch.int8)}, "is stored as int8"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("part", PARTS)
def test_a_tensor_that_is_not_what_the_config_says_is_named(copy, rewrite, part, change):
    makes, words = CHANGES[change]
    name = None

    def spoil(tensors):
        nonlocal name
        name, others = first(tensors)
        return others | {new or name: tensor for new, tensor in makes(tensors[name]).items()}

    path = rewrite(part, spoil)
    said = refused(load, copy, part)
    assert said.startswith(f"{path}: ") and re.search(words, said)
    assert name in said or change == "renamed"


@pytest.mark.parametrize("part", PARTS)
def test_damaged_files_are_named_by_all_who_read_them(copy, part, tmp_path):
    path, family = next((copy / part).glob("*.safetensors")), open_model(str(copy))
    whole = path.read_bytes()
    for content in (whole[:-100], whole[:1000], b"{" + whole, bytes(2000), b"junk"):
        path.write_bytes(content)
        assert refused(LOADERS[part], family).startswith(f"{path}: cannot be read; it is damaged")
    assert refused(family.pipeline).startswith(f"{path}: cannot be read")
    if part != "unet":
        said = refused(lambda: family.save(tmp_path / "saved", torch.float32, unet=family.load_denoiser()))
        assert said.startswith(f"{path}: cannot be read")


def test_large_numbers_are_not_taken_for_infinite(copy, rewrite):
    path = rewrite(
        "unet", lambda tensors: tensors | {"conv_in.weight": torch.full_like(tensors["conv_in.weight"], 3e38)}
    )
    assert torch.equal(load(copy, "unet").conv_in.weight, load_file(path)["conv_in.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("part", PARTS)
def test_other_precisions_come_in_float32(copy, rewrite, part, dtype):
    path = rewrite(part, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    state, wanted = load(copy, part).state_dict(), load_file(path)
    assert state.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name].float()) for name, tensor in state.items())


def test_former_names_of_attention(copy, rewrite, family):
    """Those of the VAE files of Stable Diffusion 1.x and 2.x."""
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(name):
        for now, then in former.items():
            name = name.replace(f"attentions.0.{now}.", f"attentions.0.{then}.")
        return name

    path = rewrite("vae", lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})
    assert sum(".proj_attn." in name for name in load_file(path)) == 4, "weights and biases of encoder and decoder"
    theirs = AutoencoderKL.from_pretrained(copy, subfolder="vae").state_dict()
    ours = load(copy, "vae").state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_former_names_of_the_text_encoder(copy, rewrite, family):
    """Every name with a prefix, and the positions counted in the file."""
    wanted = family.load_text_encoders()["text_encoder"].state_dict()

    def rename(tensors):
        counted = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
        return counted | {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}

    rewrite("text_encoder", rename)
    encoder = load(copy, "text_encoder")
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in encoder.state_dict().items())
    assert not any(tensor.is_meta for tensor in [*encoder.parameters(), *encoder.buffers()])
    with torch.no_grad():
        prompts = ["a ball", "a cube"]
        ours, old = (
            model.encode_prompts(model.load_text_encoders(), prompts)["text"]
            for model in (family, open_model(str(copy)))
        )
    assert torch.equal(ours, old)


def test_shards_are_put_together_and_hold_each_tensor_once(copy, family):
    folder, wanted = copy / "unet", family.load_denoiser()
    shutil.rmtree(folder)
    wanted.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    loaded = open_model(str(copy)).load_denoiser().state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in wanted.state_dict().items())
    one, other, *_ = sorted(folder.glob("*.safetensors"))
    save_file(load_file(one) | load_file(other), other)
    assert "once more" in refused(load, copy, "unet")


def pickled(folder, part, content):
    path = next((folder / part).glob("*.safetensors"))
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    tensors = load_file(path)
    path.unlink()
    torch.save(content(tensors), folder / part / name)
    return folder / part / name


class Code:
    """What runs when it is unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('code of a model file has run')",)


@pytest.mark.parametrize("part", PARTS)
def test_pickles_are_read_and_run_nothing(copy, family, part):
    wanted = LOADERS[part](family).state_dict()
    path = pickled(copy, part, lambda tensors: tensors)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in load(copy, part).state_dict().items())
    torch.save(wanted | {"more": Code()}, path)
    assert re.search("wants to run .*exec is not opened", refused(load, copy, part))
    torch.save({"state_dict": wanted}, path)
    assert "holds other things than tensors by their names" in refused(load, copy, part)
    path.write_bytes(path.read_bytes()[:1000])
    assert "cannot be read; it is damaged" in refused(load, copy, part)
