"""The networks of the base model: diffusers' and transformers' own classes, small enough to ship (under 10 M
parameters together)."""

from __future__ import annotations

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lowvram_db.demo.pen import SIZE
from lowvram_db.demo.tokenizer import MAX_LENGTH

TEXT_WIDTH = 160
LATENT_CHANNELS = 4
LATENT_SIZE = SIZE // 4


def make_vae() -> AutoencoderKL:
    """(B, 3, 64, 64) in [-1, 1] <-> (B, 4, 16, 16)."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=LATENT_CHANNELS,
        sample_size=SIZE,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Token ids (B, 32) -> states (B, 32, 160)."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",
    )
    return CLIPTextModel(config)


def make_unet() -> UNet2DConditionModel:
    """Latents (B, 4, 16, 16), timesteps (B,), text states (B, 32, 160) -> v (B, 4, 16, 16)."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128, 128),
        layers_per_block=1,
        attention_head_dim=4,  # read by diffusers as the number of heads
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=16,
    )


def make_scheduler() -> DDIMScheduler:
    """v-prediction over a schedule that ends in noise.

    Stable Diffusion's own end (beta 0.012) leaves 7% of the signal at the last step; over 16x16 latents that is enough
    to read the picture's mean brightness from, and a sampler that starts from pure noise never gets it right.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.02,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )
