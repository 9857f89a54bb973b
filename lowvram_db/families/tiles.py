"""A VAE that takes pictures in overlapping tiles, where the memory does not suffice for whole ones."""

from typing import Any

LEAST = 256  # pixels a side of a tile: smaller ones see too little of a picture, and seams show
MOST = 4  # times that tile() says yes: from VAEs made for 2,048 px


def tile(vae: Any) -> bool:
    """Let it take pictures larger than those it was made for in tiles from now on; asked again, larger than half the
    side, and so on. Whether that is any change."""
    if are_least(vae):
        return False
    if vae.use_tiling:
        vae.tile_sample_min_size //= 2
        vae.tile_latent_min_size //= 2
    vae.enable_tiling()
    return True


def are_least(vae: Any) -> bool:
    """Whether its tiles cannot be smaller."""
    return bool(vae.use_tiling and vae.tile_sample_min_size < 2 * LEAST)
