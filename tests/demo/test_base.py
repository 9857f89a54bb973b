"""The shipped base model: small, standard, and draws what its prompt says."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

from lowvram_db.demo.critic import CRITIC_FILE, load_critic
from lowvram_db.demo.export import BASE_FOLDER
from lowvram_db.demo.measure import prompt_accuracy, prompts_to_check


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    loaded = StableDiffusionPipeline.from_pretrained(BASE_FOLDER)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_it_is_small(pipeline: StableDiffusionPipeline) -> None:
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder, load_critic())
    assert sum(p.numel() for part in parts for p in part.parameters()) <= 10_000_000
    assert sum(p.stat().st_size for p in [*BASE_FOLDER.rglob("*.*"), CRITIC_FILE] if p.is_file()) <= 20_000_000
    assert not list(BASE_FOLDER.rglob("*.bin")) and len(list(BASE_FOLDER.rglob("*.safetensors"))) == 3


def test_it_loads_in_full_precision(pipeline: StableDiffusionPipeline) -> None:
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.float32}


def test_it_draws_what_the_prompt_says(pipeline: StableDiffusionPipeline) -> None:
    share = prompt_accuracy(pipeline, load_critic(), prompts_to_check(40, unseen=False), steps=15)
    assert share["setting"] >= 0.85 and share["colour"] >= 0.75 and share["class"] >= 0.75, share
