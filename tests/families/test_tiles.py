"""Tiles get smaller each time they are asked for, and show the same picture up to their seams."""

import pytest
import torch
from diffusers import AutoencoderKL

from lowvram_db.families.tiles import LEAST, MOST, are_least, tile


def small(made_for):
    torch.manual_seed(0)
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    return AutoencoderKL(**kinds, block_out_channels=[4] * 4, norm_num_groups=2, sample_size=made_for).eval()


@pytest.mark.parametrize(
    ("made_for", "sides"), [(128, [128]), (512, [512, 256]), (768, [768, 384]), (2048, [2048, 1024, 512, 256])]
)
def test_they_are_what_the_vae_was_made_for_and_then_of_half_the_side(made_for, sides):
    vae, seen = small(made_for), []
    assert not are_least(vae)
    while tile(vae):
        seen.append(vae.tile_sample_min_size)
        assert vae.tile_latent_min_size * 8 == seen[-1]
    assert seen == sides and len(sides) <= MOST and are_least(vae)
    assert made_for < LEAST or seen[-1] >= LEAST


@torch.no_grad()
def test_a_picture_in_tiles_is_the_whole_one_but_for_its_seams():
    vae, latents = small(512), torch.randn(1, 4, 64, 64)
    whole = vae.decode(latents).sample
    tile(vae)
    assert torch.equal(vae.decode(latents).sample, whole), "as large as one of these"
    tile(vae)
    tiled = vae.decode(latents).sample
    assert tiled.shape == whole.shape and not torch.equal(tiled, whole)
    assert (tiled - whole).abs().mean() < 0.1 * whole.std()
