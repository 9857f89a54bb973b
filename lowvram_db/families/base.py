"""The interface between the trainer and a family of models: the only way a model is loaded, called or saved.

A family opens one model folder in diffusers' format and hands out its parts one at a time, so that the three big
networks never have to sit in memory together. Tensors cross this border in the trainer's terms:

    pixels        float32 [B, 3, H, W] in [-1, 1]
    moments       the VAE posterior's mean and log-variance, float32 [B, C, h, w], in the denoiser's latent scale
    latents       float32 [B, C, h, w], in the denoiser's scale
    conditioning  what the denoiser wants to know of prompts and pictures, by name, [B, ...] each
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from lowvram_db.families.conditioning import Conditioning
from lowvram_db.formats.names import CLIP_PREFIX
from lowvram_db.wording import NO_PROMPT as NO_PROMPT

if TYPE_CHECKING:
    from lowvram_db.framing import View


class Moments(NamedTuple):
    """A diagonal Gaussian over latents, already multiplied by the VAE's scaling factor."""

    mean: Tensor
    logvar: Tensor


@dataclass(frozen=True)
class NoiseSchedule:
    """How the model's own scheduler adds noise and what it asks the denoiser to predict."""

    alphas_cumprod: Tensor  # float32 [T]
    prediction_type: str  # "epsilon" | "v_prediction"

    @property
    def ends_in_noise(self) -> bool:
        """Whether the signal is zero at the last timestep (Lin et al. 2024)."""
        return self.alphas_cumprod[-1].item() == 0


class Architecture(ABC):
    """What a model's config files tell: the shape of its networks, and how the denoiser is called.

    Every load_* call makes that part anew, on the CPU and in eval mode: with its weights in a Family, without any in a
    Blank (blank.py).
    """

    folder: Path
    denoiser_part: str  # the denoiser's name in the model folder
    noise_schedule: NoiseSchedule
    native_resolution: int  # pixels a side the model was made for
    latent_channels: int
    latent_side: int  # pixels a side of one latent
    side_multiple: int  # what an image's sides have to be divisible by, pixels
    checkpoint_steps: int  # how many checkpoint_blocks gives

    @abstractmethod
    def load_vae(self, dtype: torch.dtype = torch.float32) -> nn.Module: ...

    @abstractmethod
    def load_text_encoders(self, dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
        """All of them, each by its name in the model folder."""

    @abstractmethod
    def load_denoiser(self, narrow: Callable[[Tensor], Tensor] = lambda weight: weight) -> nn.Module:
        """The denoiser with float32 weights, or with what `narrow` makes of each, one after the other."""

    @abstractmethod
    def encode_prompts(self, text_encoders: Mapping[str, Any], prompts: list[str]) -> Conditioning:
        """The part of the conditioning that follows from the prompts, in the encoders' dtype and on their device."""

    def view_conditioning(self, view: View) -> Conditioning:
        """The part that follows from how a picture is looked at: exact, on the CPU, without a row's dimension."""
        return {}

    @abstractmethod
    def denoise(self, denoiser: Any, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Noisy latents [B, C, h, w], timesteps int64 [B], conditioning of both parts -> prediction [B, C, h, w]."""

    def trainable(self, part: str, network: nn.Module) -> dict[str, nn.Parameter]:
        """Those of a part's parameters that have a part in what the denoiser predicts, by their names in it."""
        return dict(network.named_parameters())

    @abstractmethod
    def checkpoint_blocks(self, denoiser: Any) -> list[nn.Module]:
        """Parts of the denoiser that can recompute their activations, those first that save most for what it costs."""


class Family(Architecture):
    """One model on disk."""

    vae_files: list[Path]  # files whose bytes decide what encode_images gives
    text_files: list[Path]  # files whose bytes decide what encode_prompts gives
    model_files: list[Path]  # files whose bytes decide what the model is: all configs and weights, and the tokenizers
    remarks: list[str]  # what to know before training it
    # Weights that the text encoders have instead of those in text_files, by the names of network and tensor.
    tuned: Mapping[str, Tensor] = MappingProxyType({})

    # What is added to weights by whichever network is loaded, by the names of network and tensor, float32.
    added: Mapping[str, Callable[[], Tensor]] = MappingProxyType({})

    def with_added(self, changes: Mapping[str, Callable[[], Tensor]]) -> Self:
        """The same model, whose networks have these changes from now on, as a LoRA has them, wherever it loads."""
        other = copy.copy(self)
        other.added = changes
        return other

    def with_tuned(self, weights: Mapping[str, Tensor]) -> Self:
        """The same model, whose text encoders have these weights from now on, wherever it loads, encodes or saves."""
        other = copy.copy(self)
        other.tuned = weights
        return other

    @torch.no_grad()
    def tune(self, part: str, network: nn.Module) -> None:
        """Give a network that was read from its files the weights it has instead, and what is added to them."""
        for name, weight in network.named_parameters():
            if (tuned := self.tuned.get(f"{part}.{name}")) is not None:
                weight.copy_(tuned)
            if (change := self.added.get(f"{part}.{name.removeprefix(CLIP_PREFIX)}")) is not None:
                weight.add_(change().reshape(weight.shape).to(weight.device))

    @abstractmethod
    def encode_images(self, vae: Any, pixels: Tensor) -> Moments:
        """pixels float32 [B, 3, H, W] -> float32 moments [B, C, h, w]; not finite where the VAE's dtype overflowed."""

    @abstractmethod
    def decode_latents(self, vae: Any, latents: Tensor) -> Tensor:
        """latents [B, C, h, w] -> pixels float32 [B, 3, H, W]; not finite where the VAE's dtype overflowed."""

    @abstractmethod
    def check_prompts(self, prompts: list[str]) -> None:
        """Raise UserError for a prompt longer than a text encoder reads; it would be cut in silence."""

    @abstractmethod
    def sampler(self, denoiser: Any) -> Any:
        """A diffusers pipeline that holds this denoiser and nothing else: called with sampling_inputs it gives latents
        in the denoiser's scale, for output_type="latent"."""

    @abstractmethod
    def sampling_inputs(self, conditioning: Conditioning) -> dict[str, Any]:
        """What the pipeline is to be called with. conditioning: the text part of two rows, a prompt and NO_PROMPT."""

    @abstractmethod
    def pipeline(self, dtype: torch.dtype = torch.float32, **parts: Any) -> Any:
        """A whole diffusers pipeline; a part given by name (or None) is used instead of being loaded."""

    @abstractmethod
    def save(
        self, folder: Path, dtype: torch.dtype, written: Mapping[str, Path] = MappingProxyType({}), **trained: nn.Module
    ) -> None:
        """Write a whole diffusers model into an empty folder: the trained parts by name, the rest as they were.

        dtype: of each part, unless numbers in it are too large for that. written: files that hold a trained part in
        this dtype already, by its name.
        """
