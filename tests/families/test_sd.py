import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from lowvram_db.demo.miniature import write_pipeline
from lowvram_db.errors import UserError
from lowvram_db.families import open_model

SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"


def test_moments_are_the_vaes_posterior_in_latent_scale(family):
    vae = family.load_vae()
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        moments = family.encode_images(vae, pixels)
        posterior = vae.encode(pixels).latent_dist
    scale = vae.config.scaling_factor
    torch.testing.assert_close(moments.mean, posterior.mean * scale)
    torch.testing.assert_close(torch.exp(0.5 * moments.logvar), posterior.std * scale)


def test_conditioning_is_what_the_pipeline_computes(family, miniature):
    prompts = ["a photo of a pkblz ball", ""]
    pipeline = StableDiffusionPipeline.from_pretrained(miniature, safety_checker=None)
    with torch.no_grad():
        ours = family.encode_prompts(family.load_text_encoders(), prompts)
        theirs, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)
    assert torch.equal(ours["text"], theirs)


def test_the_prompt_is_read(family):
    with torch.no_grad():
        prompts = ["a photo of a ball", "a photo of a pkblz ball"]
        one, other = family.encode_prompts(family.load_text_encoders(), prompts)["text"]
    assert (one - other).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pipeline_draws_with_the_weights_diffusers_reads(family, miniature, dtype):
    theirs = StableDiffusionPipeline.from_pretrained(miniature, safety_checker=None, dtype=dtype)
    ours = family.pipeline(dtype)
    for part in ("unet", "vae", "text_encoder"):
        wanted = getattr(theirs, part).state_dict()
        for name, tensor in getattr(ours, part).state_dict().items():
            assert tensor.dtype == wanted[name].dtype and torch.equal(tensor, wanted[name]), name


def test_denoise_calls_the_unet(family):
    denoiser = family.load_denoiser()
    latents, conditioning = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 32)
    timesteps = torch.tensor([3, 900])
    with torch.no_grad():
        got = family.denoise(denoiser, latents, timesteps, {"text": conditioning})
        assert torch.equal(got, denoiser(latents, timesteps, conditioning).sample)


def test_noise_schedule_is_the_models_own(family, tmp_path):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(
        family.noise_schedule.alphas_cumprod.double(), torch.cumprod(1 - betas, 0), rtol=1e-4, atol=1e-7
    )
    assert family.noise_schedule.prediction_type == "epsilon"
    write_pipeline(tmp_path / "v", prediction_type="v_prediction")
    assert open_model(str(tmp_path / "v")).noise_schedule.prediction_type == "v_prediction"


def test_saved_model_loads_in_diffusers_with_the_trained_part(family, tmp_path):
    denoiser = family.load_denoiser()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.5)
    wanted = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    family.save(tmp_path / "model", torch.float32, unet=denoiser)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    for name, tensor in pipeline.unet.state_dict().items():
        assert torch.equal(tensor, wanted[name])
    original = family.load_text_encoders()["text_encoder"].state_dict()
    assert all(torch.equal(tensor, original[name]) for name, tensor in pipeline.text_encoder.state_dict().items())
    assert pipeline("a ball", num_inference_steps=1, height=64, width=64).images[0].size == (64, 64)
    family.save(tmp_path / "half", torch.float16, unet=denoiser)
    half = StableDiffusionPipeline.from_pretrained(tmp_path / "half", dtype=torch.float16)
    assert half.unet.dtype == half.vae.dtype == torch.float16


def test_the_hubs_layout_without_its_safety_checker(copy, edit, tmp_path):
    """Stable Diffusion 1.x on the hub names a safety checker and PNDM; neither is downloaded or needed."""
    edit(
        "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        requires_safety_checker=True,
        scheduler=["diffusers", "PNDMScheduler"],
    )
    edit("scheduler/scheduler_config.json", _class_name="PNDMScheduler", skip_prk_steps=True)
    family = open_model(str(copy))
    family.save(tmp_path / "saved", torch.float32, unet=family.load_denoiser())
    for folder in (copy, tmp_path / "saved"):
        pipeline = open_model(str(folder)).pipeline()
        assert pipeline("a ball", num_inference_steps=2, height=64, width=64).images[0].size == (64, 64)
    saved = StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert saved.safety_checker is None
    assert type(saved.scheduler).__name__ == "PNDMScheduler", "the model keeps its own scheduler"


def test_a_prompt_that_would_be_cut_is_refused(family):
    family.check_prompts(["x" * 75])
    with pytest.raises(UserError, match="78 tokens, the model reads 77"):
        family.check_prompts(["short", "x" * 76])


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_missing_part_is_named(copy, part):
    shutil.rmtree(copy / part)
    with pytest.raises(UserError, match=rf"{part}/config\.json: missing"):
        open_model(str(copy))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_missing_weights_are_named(copy, part):
    for file in (copy / part).glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match=rf"{part}: no weights"):
        open_model(str(copy))


def test_the_files_that_make_the_model_are_all_that_make_it(copy, family):
    """Stray files beside them, and what names and describes it, change nothing."""
    for file in (
        "unet/old.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "tokenizer/README.md",
        ".DS_Store",
    ):
        (copy / file).write_bytes(b"?")
    files = [str(file.relative_to(copy)) for file in open_model(str(copy)).model_files]
    assert files == [str(file.relative_to(family.folder)) for file in family.model_files]
    everything = {str(file.relative_to(family.folder)) for file in family.folder.rglob("*") if file.is_file()}
    assert set(files) == everything - {"model_index.json"} and len(files) == len(set(files))


@pytest.mark.parametrize("limit", [77, 1e30, 100])
def test_prompts_are_as_long_as_the_text_encoder_reads(copy, edit, limit):
    edit("tokenizer/tokenizer_config.json", model_max_length=int(limit))
    model = open_model(str(copy))
    assert model.encode_prompts(model.load_text_encoders(), ["a ball"])["text"].shape == (1, 77, 32)


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", "[", "[1]", "version https://git-lfs.github.com/spec/v1"])
def test_a_damaged_tokenizer_is_named(copy, name, content):
    (copy / "tokenizer" / name).write_text(content)
    if name == "vocab.json":
        (copy / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="/tokenizer") as refused:
        open_model(str(copy))
    assert "\n" not in str(refused.value)


def test_a_missing_tokenizer_is_named(copy):
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(UserError, match="tokenizer: holds no CLIP tokenizer"):
        open_model(str(copy))


def test_a_tokenizer_of_another_model_is_refused(copy, edit):
    edit("text_encoder/config.json", vocab_size=100)
    with pytest.raises(UserError, match="tokenizer: has 514 tokens, text_encoder/ knows 100"):
        open_model(str(copy))


def test_the_real_clip_vocabulary(copy, edit):
    """The layout of the hub's Stable Diffusion 1.x: vocab.json and merges.txt, 49,408 tokens."""
    source = SHARED_DATA / "clip-tokenizer"
    if not source.is_dir():
        pytest.skip(f"CLIP's vocabulary is not at {source}")
    shutil.rmtree(copy / "tokenizer")
    shutil.copytree(source, copy / "tokenizer")
    edit("text_encoder/config.json", vocab_size=49408)
    tokenizer = open_model(str(copy))._tokenizers["text_encoder"]
    assert tokenizer("a photo of a sks dog").input_ids == [49406, 320, 1125, 539, 320, 48136, 1929, 49407]


def test_what_is_no_text_to_image_unet_is_refused(copy, edit):
    edit("unet/config.json", in_channels=9)
    with pytest.raises(UserError, match="takes 9 and gives 4 channels"):
        open_model(str(copy))


def test_parts_of_different_models_are_refused(copy, edit):
    edit("unet/config.json", cross_attention_dim=1024)
    with pytest.raises(UserError, match="wants text 1024 wide, but text_encoder/ gives 32"):
        open_model(str(copy))


def test_another_kind_of_pipeline_is_refused(copy, edit):
    edit("model_index.json", _class_name="StableDiffusionInpaintPipeline")
    with pytest.raises(UserError, match="a StableDiffusionInpaintPipeline cannot be trained here"):
        open_model(str(copy))


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"model_index\.json: missing"):
        open_model(str(tmp_path))
