"""The last stage: text encoder and UNet learn together, what captions look like.

v-prediction (Salimans & Ho 2022) on cached latents, a tenth of the captions empty for classifier-free guidance.
Timesteps are spread over each batch, leaning to the less noisy: on latents as small as these a uniform half of them
would show next to nothing of the picture.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from lowvram_db.demo.captions import caption
from lowvram_db.demo.models import make_scheduler, make_text_encoder, make_unet
from lowvram_db.demo.names import individuals
from lowvram_db.demo.stage import Budget, Fit
from lowvram_db.demo.tokenizer import RARE_WORDS, name_pieces
from lowvram_db.demo.world import training_scene

EMPTY_SHARE = 0.1
LEAN = 1.25  # timestep = 1000 u^LEAN with u spread evenly over [0, 1]
MEASURED_BATCHES = 8


class Base(nn.Module):
    """Text encoder and UNet as one module, so that one optimizer and one average hold both."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text_encoder: CLIPTextModel = make_text_encoder(tokenizer)
        self.unet: UNet2DConditionModel = make_unet()

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        """Latents (B, 4, 16, 16), timesteps (B,), token ids (B, 32) -> predicted v (B, 4, 16, 16)."""
        states = self.text_encoder(ids)[0]
        predicted: Tensor = self.unet(noisy, timesteps, states, return_dict=False)[0]
        return predicted


def pipeline_of(base: Base, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=base.text_encoder,
        tokenizer=tokenizer,
        unet=base.unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def diffusion_loss(
    base: Base, latents: Tensor, ids: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor
) -> Tensor:
    """The squared error on v, mean over all elements."""
    signal = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
    target = signal.sqrt() * noise - (1 - signal).sqrt() * latents
    with torch.autocast(latents.device.type, torch.bfloat16):
        predicted = base(noisy, timesteps, ids)
    return F.mse_loss(predicted.float(), target)


def give_rare_words_a_place(base: Base, tokenizer: CLIPTokenizer) -> None:
    """Puts the tokens that no caption used among the pieces of names.

    A token that was never trained keeps its tiny first embedding and reads as no word at all; UNet-only DreamBooth on
    it learns next to nothing. In a big model rare tokens have been read often enough to be words: here they are drawn
    from the normal distribution of the trained pieces, as words nobody knows yet.
    """
    embedding = base.text_encoder.get_input_embeddings().weight
    pieces = name_pieces(tokenizer, (one.name for one in individuals()))
    known = embedding.detach()[pieces]
    used = set(pieces)
    rare = [i for i in name_pieces(tokenizer, RARE_WORDS) if i not in used]
    chance = torch.Generator().manual_seed(4)
    drawn = torch.randn(len(rare), known.shape[1], generator=chance).to(known)
    with torch.no_grad():
        embedding[rare] = known.mean(0) + drawn * known.std(0)


def train_base(
    moments: Tensor,
    scaling_factor: float,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    budget: Budget,
    folder: Path,
    device: str,
) -> Base:
    """Learns on the stream's cached posterior `moments` (N, 8, 16, 16: means, then standard deviations)."""
    torch.manual_seed(3)
    base = Base(tokenizer).to(device)
    base.text_encoder.load_state_dict(text_encoder.state_dict())
    if device == "cpu":  # the fused attention's backward is slow on short sequences there: 0.39 s a step against 0.29
        base.unet.set_attn_processor(AttnProcessor())
    alphas = make_scheduler().alphas_cumprod.to(device)
    scenes = [training_scene(i) for i in range(len(moments))]

    def draw(step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rng, words = np.random.default_rng((3, step % 2**32)), Random(f"captions of step {step}")
        chosen = rng.integers(0, len(scenes), budget.batch)
        texts = ["" if words.random() < EMPTY_SHARE else caption(scenes[i], words) for i in chosen]
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
        mean, std = moments[chosen].float().chunk(2, 1)
        posterior, noise = torch.from_numpy(rng.standard_normal((2, *mean.shape), dtype=np.float32))
        spread = (np.arange(budget.batch) + rng.random(budget.batch)) / budget.batch
        timesteps = torch.from_numpy((spread**LEAN * len(alphas)).astype(np.int64))
        return (mean + std * posterior) * scaling_factor, ids, noise, timesteps

    def loss_on(learner: Base, step: int) -> Tensor:
        latents, ids, noise, timesteps = (part.to(device) for part in draw(step))
        return diffusion_loss(learner, latents, ids, noise, timesteps, alphas)

    def measure(average: nn.Module) -> dict[str, float]:
        assert isinstance(average, Base)
        with torch.inference_mode():
            losses = [loss_on(average, -1 - i).item() for i in range(MEASURED_BATCHES)]
        return {"fixed loss": sum(losses) / len(losses)}

    Fit("base", base, budget, folder).run(lambda step: loss_on(base, step), measure)
    give_rare_words_a_place(base, tokenizer)
    return base
