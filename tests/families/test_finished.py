import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from lowvram_db.families.finished import save_network
from lowvram_db.files.writer import write_tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("part", ["denoiser", "vae", "text_encoder"])
def test_the_files_are_those_that_save_pretrained_writes(family, tmp_path, part, dtype):
    """From a network in float32, in memory of any order."""
    load = {
        "denoiser": family.load_denoiser,
        "vae": family.load_vae,
        "text_encoder": lambda: family.load_text_encoders()["text_encoder"],
    }[part]
    save_network(load().to(memory_format=torch.channels_last), tmp_path / "ours", dtype)
    load().to(dtype).save_pretrained(tmp_path / "theirs")
    ours, theirs = ({path.name: path for path in (tmp_path / who).iterdir()} for who in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for name, path in ours.items():
        if path.suffix == ".json":
            wanted = json.loads(theirs[name].read_text())
            # Of the text encoder: diffusers loads the rest in float32 where no dtype is asked for.
            assert json.loads(path.read_text()) == wanted | ({"dtype": "float32"} if "dtype" in wanted else {})
        else:
            assert path.read_bytes() == theirs[name].read_bytes()


def test_numbers_too_large_for_a_precision_are_not_lost(family, tmp_path, capfd):
    denoiser = family.load_denoiser()
    with torch.no_grad():
        denoiser.conv_in.weight[0, 0, 0, 0] = 1e5
    in_half = tmp_path / "unet.safetensors"  # as a checkpoint of the last step holds them
    write_tensors(in_half, denoiser.state_dict(), torch.float16)
    family.save(tmp_path / "model", torch.float16, {"unet": in_half}, unet=denoiser)
    assert "unet: 1 of its tensors hold numbers too large for float16; it is saved in float32" in capfd.readouterr().err
    saved = load_file(tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in denoiser.state_dict().items())
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    assert pipeline.unet.dtype == torch.float32
    files = {part: next((tmp_path / "model" / part).glob("*.safetensors")) for part in ("vae", "text_encoder")}
    assert all(t.dtype == torch.float16 for file in files.values() for t in load_file(file).values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_draws_as_it_is_loaded(family, tmp_path, dtype):
    """With no dtype asked for, as people load it."""
    family.save(tmp_path / "model", dtype, unet=family.load_denoiser())
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    assert pipeline.text_encoder.dtype == pipeline.unet.dtype == torch.float32
    assert pipeline("a ball", num_inference_steps=1, height=64, width=64).images[0].size == (64, 64)
