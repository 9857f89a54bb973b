"""Recolouring turns hues and leaves brightness; the stage moves what it should and leaves latents where they were."""

import colorsys
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram_db.demo.autoencoder import psnr, reconstruct
from lowvram_db.demo.models import make_vae
from lowvram_db.demo.scenes import critic_scene, held_out_scene, to_pixels
from lowvram_db.demo.stage import Budget
from lowvram_db.demo.widen import latents_of, recoloured, turned_hue, widen
from lowvram_db.demo.world import render


def constant(angle: float) -> torch.Tensor:
    return torch.full((1, 1, 1), angle)


def test_a_third_of_a_turn_swaps_the_channels() -> None:
    pixels = torch.tensor([0.9, -0.3, 0.2]).view(1, 3, 1, 1)
    turned = turned_hue(pixels, constant(2 * math.pi / 3)).flatten()
    assert torch.allclose(turned, torch.tensor([0.2, 0.9, -0.3]), atol=1e-6)


@given(st.floats(-1, 1), st.floats(-1, 1), st.floats(-1, 1), st.floats(-7, 7))
@settings(max_examples=50, deadline=None)
def test_turning_keeps_brightness_and_distance_from_grey(r: float, g: float, b: float, angle: float) -> None:
    pixels = torch.tensor([r, g, b], dtype=torch.float64).view(1, 3, 1, 1)
    turned = turned_hue(pixels, constant(angle).double())
    assert turned.sum().item() == pytest.approx(r + g + b, abs=1e-6)
    assert turned.norm().item() == pytest.approx(pixels.norm().item(), abs=1e-6)


def test_recolouring_gives_hues_that_change_across_the_picture() -> None:
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(64, 3, 16, 16)
    pixels = recoloured(red, np.random.default_rng(0))
    assert pixels.shape == red.shape and pixels.abs().max() <= 1
    row = ((pixels[:, :, 8] + 1) / 2).permute(0, 2, 1).tolist()
    spans = [len({round(colorsys.rgb_to_hsv(*colour)[0] * 12) % 12 for colour in line}) for line in row]
    assert sum(span >= 3 for span in spans) >= 20 and sum(span == 1 for span in spans) >= 10


def test_the_stage_learns_colours_and_holds_the_latents_of_scenes(tmp_path) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    vae = make_vae()
    vae.register_to_config(scaling_factor=1.0)
    scenes = np.stack([np.asarray(render(held_out_scene(i))) for i in range(8)])[:, ::2, ::2]  # a quarter of the work
    looks = np.stack([np.asarray(render(critic_scene(i))) for i in range(8)])[:, ::2, ::2]
    pixels = to_pixels(scenes)
    before, blurred = latents_of(vae, pixels), psnr(reconstruct(vae, pixels), pixels)
    widen(vae, scenes, looks, scenes, Budget(steps=25, batch=8, lr=2e-3, warmup=2, measure_steps=25), tmp_path)
    assert psnr(reconstruct(vae, pixels), pixels) > blurred + 1
    assert (latents_of(vae, pixels) - before).square().mean() / before.var() < 0.5
