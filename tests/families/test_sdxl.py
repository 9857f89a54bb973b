import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from hypothesis import given
from hypothesis import strategies as st

from lowvram_db.cache import Framing, View
from lowvram_db.demo.miniature import write_sdxl
from lowvram_db.errors import UserError
from lowvram_db.families import open_blank, open_model

VIEW = View.of((96, 96), (64, 64))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A Stable Diffusion XL in miniature; read only."""
    folder = tmp_path_factory.mktemp("sdxl") / "model"
    write_sdxl(folder)
    return folder


@pytest.fixture(scope="module")
def family(model):
    return open_model(str(model))


@pytest.fixture(scope="module")
def pipeline(model):
    return StableDiffusionXLPipeline.from_pretrained(model)


@pytest.fixture
def copy(model, tmp_path) -> Path:
    """The miniature, to be changed."""
    return shutil.copytree(model, tmp_path / "model")


@pytest.fixture
def edit(copy):
    def edit(file, **changes):
        path = copy / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def test_text_is_what_the_pipeline_encodes(family, pipeline):
    prompts = ["a photo of a pkblz ball", ""]
    with torch.no_grad():
        ours = family.encode_prompts(family.load_text_encoders(), prompts)
        text, _, pooled, _ = pipeline.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
    torch.testing.assert_close(ours["text"], text)
    torch.testing.assert_close(ours["pooled"], pooled)


@pytest.mark.parametrize("zeros", [True, False])
def test_what_guidance_steers_away_from_is_the_pipelines(copy, edit, zeros):
    """Zeros, or what the encoders make of an empty prompt: as the model's index says."""
    edit("model_index.json", force_zeros_for_empty_prompt=zeros)
    family, pipeline = open_model(str(copy)), StableDiffusionXLPipeline.from_pretrained(copy)
    with torch.no_grad():
        inputs = family.sampling_inputs(family.encode_prompts(family.load_text_encoders(), ["a ball", ""]))
        theirs = pipeline.encode_prompt("a ball", device="cpu")
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    for name, wanted in zip(names, theirs, strict=True):
        torch.testing.assert_close(inputs[name], wanted)
    assert (inputs["negative_prompt_embeds"] == 0).all() == zeros


side = st.integers(1, 20_000)


@given(width=side, height=side, crop=st.sampled_from(["square", "buckets"]), seed=st.integers(0, 9))
def test_sizes_are_exact_whatever_the_photo(family, pipeline, width, height, crop, seed):
    """The view's corner, in whole pixels of the resized photo, leads back to the view."""
    framing = Framing(512, crop, variants=3, flip=True, seed=seed)
    for view in framing.views((width, height), "ab" * 32):
        sizes = family.view_conditioning(view)["sizes"]
        assert sizes.dtype == torch.int64
        original, corner, target = sizes.view(3, 2).tolist()
        assert original == [height, width] and target == [view.size[1], view.size[0]]
        left, top, right, bottom = view.box
        left = width - right if view.mirrored else left
        assert abs(corner[0] * (bottom - top) / view.size[1] - top) <= 0.501 * (bottom - top) / view.size[1]
        assert (
            abs(corner[1] * (view.box[2] - view.box[0]) / view.size[0] - left)
            <= 0.501 * (view.box[2] - view.box[0]) / view.size[0]
        )
        theirs = pipeline._get_add_time_ids(
            tuple(original), tuple(corner), tuple(target), torch.float64, text_encoder_projection_dim=48
        )
        assert torch.equal(sizes[None].double(), theirs)


def test_denoise_calls_the_unet(family):
    denoiser, timesteps = family.load_denoiser(), torch.tensor([3, 900])
    latents, text, pooled = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 80), torch.randn(2, 48)
    sizes = torch.tensor([[1366, 768, 0, 3, 1024, 1024], [64] * 6])
    with torch.no_grad():
        got = family.denoise(denoiser, latents, timesteps, {"text": text, "pooled": pooled, "sizes": sizes})
        added = {"text_embeds": pooled, "time_ids": sizes.float()}
        wanted = denoiser(latents, timesteps, text, added_cond_kwargs=added).sample
    assert torch.equal(got, wanted)


def test_what_nobody_listens_to_is_not_trained_and_everything_else_is(family):
    networks = {**family.load_text_encoders(), "unet": family.load_denoiser()}
    text = family.encode_prompts({part: networks[part] for part in ("text_encoder", "text_encoder_2")}, ["a ball"])
    told = text | {"sizes": family.view_conditioning(VIEW)["sizes"][None]}
    family.denoise(networks["unet"], torch.randn(1, 4, 8, 8), torch.tensor([9]), told).square().sum().backward()
    for part, network in networks.items():
        reached = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
        assert family.trainable(part, network).keys() == reached


def test_a_saved_model_is_whole_in_diffusers_with_what_was_trained(family, model, tmp_path):
    denoiser, encoders = family.load_denoiser(), family.load_text_encoders()
    with torch.no_grad():
        for network in (denoiser, encoders["text_encoder_2"]):
            for parameter in network.parameters():
                parameter.add_(0.01)
    family.save(tmp_path / "saved", torch.float32, unet=denoiser, text_encoder_2=encoders["text_encoder_2"])
    pipeline, before = (StableDiffusionXLPipeline.from_pretrained(folder) for folder in (tmp_path / "saved", model))
    wanted = {
        "unet": denoiser,
        "text_encoder_2": encoders["text_encoder_2"],
        "text_encoder": before.text_encoder,
        "vae": before.vae,
    }
    for part, network in wanted.items():
        state = getattr(pipeline, part).state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items()), part
    assert pipeline.config.force_zeros_for_empty_prompt
    indices = [json.loads((folder / "model_index.json").read_text()) for folder in (tmp_path / "saved", model)]
    assert all(indices[1][key] == value for key, value in indices[0].items())
    files = [{str(path.relative_to(at)) for path in at.rglob("*")} for at in (tmp_path / "saved", model)]
    assert files[0] == files[1]
    open_model(str(tmp_path / "saved"))


def refused(copy, opened=open_model):
    with pytest.raises(UserError) as error:
        opened(str(copy))
    assert "\n" not in str(error.value) and str(copy) in str(error.value)
    return str(error.value)


REFINER = "refiner.*; train the base model"
REFUSED = {
    "refiner, by its pipeline": ({"model_index.json": {"_class_name": "StableDiffusionXLImg2ImgPipeline"}}, REFINER),
    "refiner, by its one encoder": ({"model_index.json": {"text_encoder": [None, None]}}, REFINER),
    "refiner, by its width": (
        {"unet/config.json": {"cross_attention_dim": 48}},
        r"unet: wants text 48 wide, but the text encoders give 80; .*refiner",
    ),
    "refiner, by its sizes": (
        {"unet/config.json": {"projection_class_embeddings_input_dim": 48 + 5 * 8}},
        "projection_class_embeddings_input_dim is 88, and text_encoder_2's 48 and 6 sizes of 8 are given",
    ),
    "no sizes": ({"unet/config.json": {"addition_time_embed_dim": None}}, "6 sizes of None are given"),
    "inpainting": ({"unet/config.json": {"in_channels": 9}}, "takes 9 .* inpainting and edit models cannot be trained"),
    "edit": ({"unet/config.json": {"in_channels": 8}}, "takes 8 .* inpainting and edit models cannot be trained"),
    "inpainting, by its pipeline": (
        {"model_index.json": {"_class_name": "StableDiffusionXLInpaintPipeline"}},
        "it fills holes in pictures; train a text-to-image model",
    ),
    "edit, by its pipeline": (
        {"model_index.json": {"_class_name": "StableDiffusionXLInstructPix2PixPipeline"}},
        "it edits pictures; train a text-to-image model",
    ),
    "a second encoder without projection": (
        {"model_index.json": {"text_encoder_2": ["transformers", "CLIPTextModel"]}},
        "text_encoder_2 is a CLIPTextModel; a CLIPTextModelWithProjection is supported",
    ),
    "a second encoder of another model": (
        {"text_encoder_2/config.json": {"hidden_size": 32}},
        "wants text 80 wide, but the text encoders give 64; they are of different models",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_from_the_configs_alone(copy, edit, what):
    changes, words = REFUSED[what]
    for file, fields in changes.items():
        edit(file, **fields)
    assert re.search(words, refused(copy))
    assert re.search(words, refused(copy, lambda folder: open_blank(Path(folder))))


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
def test_a_missing_folder_is_named(copy, part):
    shutil.rmtree(copy / part)
    assert re.search(rf"{part}(/config\.json: missing|: holds no CLIP tokenizer)", refused(copy))


def test_missing_weights_of_the_second_encoder_are_named(copy):
    (copy / "text_encoder_2" / "model.safetensors").unlink()
    assert "text_encoder_2: no weights" in refused(copy)


def test_a_prompt_has_to_fit_every_tokenizer(copy, edit):
    edit("tokenizer_2/tokenizer_config.json", model_max_length=20)
    with pytest.raises(UserError, match="the model reads 20; shorten it"):
        open_model(str(copy)).check_prompts(["x" * 30])
