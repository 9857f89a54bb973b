import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from lowvram_db.errors import UserError
from lowvram_db.families import open_model
from lowvram_db.optim.adam8 import Adam8
from lowvram_db.optim.storage import SMALLEST, narrowing


@pytest.fixture
def copy(miniature, tmp_path):
    """The miniature, to be changed."""
    return shutil.copytree(miniature, tmp_path / "model")


def test_weights_come_as_diffusers_reads_them(family, miniature):
    theirs = UNet2DConditionModel.from_pretrained(miniature, subfolder="unet", dtype=torch.float32)
    ours = family.load_denoiser()
    assert not ours.training and not any(p.is_meta for p in [*ours.parameters(), *ours.buffers()])
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name


def test_a_model_in_half_precision_comes_in_float32(copy):
    unet = copy / "unet" / "diffusion_pytorch_model.safetensors"
    half = {name: tensor.half() for name, tensor in load_file(unet).items()}
    save_file(half, unet)
    loaded = open_model(str(copy)).load_denoiser().state_dict()
    assert all(torch.equal(tensor, half[name].float()) for name, tensor in loaded.items())


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


def test_damaged_and_foreign_weights_are_named(copy):
    unet = copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(unet)
    tensors.pop("conv_in.weight")
    save_file(tensors, unet)
    with pytest.raises(UserError, match="unet: its weights cannot be read"):
        open_model(str(copy)).load_denoiser()
    unet.write_bytes(unet.read_bytes()[:1000])
    with pytest.raises(UserError, match="unet: its weights cannot be read"):
        open_model(str(copy)).load_denoiser()
