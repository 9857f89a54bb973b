"""Which parts a single file of each family has, under which prefix, and how their tensors are called there."""

from typing import NamedTuple

from lowvram_db.formats.names import CLIP, OPENCLIP, UNET, VAE, Names

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
EMA_PREFIX = "model_ema."


class Part(NamedTuple):
    """A network in the file."""

    prefix: str
    names: Names


# By the names of the folders of config files that come with the package; each part by that of a folder in diffusers'
# format.
LAYOUTS: dict[str, dict[str, Part]] = {
    "sd1": {
        "unet": Part(UNET_PREFIX, UNET),
        "vae": Part(VAE_PREFIX, VAE),
        "text_encoder": Part("cond_stage_model.transformer.", CLIP),
    },
    "sd2": {
        "unet": Part(UNET_PREFIX, UNET),
        "vae": Part(VAE_PREFIX, VAE),
        "text_encoder": Part("cond_stage_model.model.", OPENCLIP),
    },
    "sdxl": {
        "unet": Part(UNET_PREFIX, UNET),
        "vae": Part(VAE_PREFIX, VAE),
        "text_encoder": Part("conditioner.embedders.0.transformer.", CLIP),
        "text_encoder_2": Part("conditioner.embedders.1.model.", OPENCLIP),
    },
}
