"""Networks that judge pictures: what they see of a picture, and whether it shows what was asked for.

Pictures come as squares of one size and are resized alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import normalize

from lowvram_db.errors import UserError

_SIDE = 224  # pixels; what all but a larger CLIP look at
_AT_ONCE = 16
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Backbone(ABC):
    """A loaded network. Embeddings have length 1."""

    reads_prompts = True

    @abstractmethod
    def embed(self, pictures: Sequence[Image.Image]) -> Tensor:
        """What is shown, float32 [N, D]."""

    def appearance(self, pictures: Sequence[Image.Image]) -> Tensor:
        """How it is shown, float32 [N, E]: a copy lies next to its original."""
        return self.embed(pictures)

    def agreement(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """With a prompt each, which names the class alone: float32 [N], more is better."""
        raise NotImplementedError


class DinoV2(Backbone):
    """Oquab et al. 2023; the similarity of class tokens, as the DreamBooth paper takes it of DINO."""

    def __init__(self, folder: Path, device: torch.device, reader: Clip | None):
        from transformers import Dinov2Model

        self._network = _loaded(Dinov2Model, folder, device)
        self._device, self._reader, self.reads_prompts = device, reader, reader is not None

    @torch.inference_mode()
    def embed(self, pictures: Sequence[Image.Image]) -> Tensor:
        return _embedded(
            lambda pixels: self._network(pixel_values=pixels).last_hidden_state[:, 0],
            _pixels(pictures, _SIDE, *_IMAGENET),
            self._device,
        )

    def agreement(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        assert self._reader is not None
        return self._reader.agreement(pictures, prompts)


class Clip(Backbone):
    """Radford et al. 2021; similarities of images (CLIP-I) and of images with texts (CLIP-T)."""

    def __init__(self, folder: Path, device: torch.device):
        from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

        self._vision = _loaded(CLIPVisionModelWithProjection, folder, device)
        self._text = _loaded(CLIPTextModelWithProjection, folder, device)
        try:
            self._tokenizer: Any = CLIPTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: has no tokenizer that can be read ({_line(error)})") from error
        self._device = device

    @torch.inference_mode()
    def embed(self, pictures: Sequence[Image.Image]) -> Tensor:
        return _embedded(
            lambda pixels: self._vision(pixel_values=pixels).image_embeds,
            _pixels(pictures, self._vision.config.image_size, *_CLIP),
            self._device,
        )

    @torch.inference_mode()
    def agreement(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        different = list(dict.fromkeys(prompts))
        tokens = self._tokenizer(different, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
        texts = normalize(self._text(**tokens.to(self._device)).text_embeds.float(), dim=1).cpu()
        rows = torch.tensor([different.index(prompt) for prompt in prompts])
        return (self.embed(pictures) * texts[rows]).sum(1)


def _loaded(kind: Any, folder: Path, device: torch.device) -> Any:
    try:
        network, found = kind.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be read as a {kind.__name__} ({_line(error)}); replace it") from error
    if missing := sorted(found["missing_keys"]):  # which transformers would leave at random
        raise UserError(f"{folder}: lacks {len(missing)} weights of a {kind.__name__} ({missing[0]}); replace it")
    return network.eval().to(device)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


class ImageNet(Backbone):
    """The mean of EfficientNet-Lite0's last feature map: neither CLIP-I nor DINO, but without a download."""

    reads_prompts = False

    def __init__(self, weights: Path, device: torch.device):
        from efficientnet_lite_pytorch import EfficientNet

        self._network = EfficientNet.from_name("efficientnet-lite0").eval().to(device)
        self._network.load_state_dict(torch.load(weights, map_location=device, weights_only=True))
        self._device = device

    @torch.inference_mode()
    def embed(self, pictures: Sequence[Image.Image]) -> Tensor:
        middle, spread = (127 / 255,) * 3, (128 / 255,) * 3
        return _embedded(
            lambda pixels: self._network.extract_features(pixels).mean((2, 3)),
            _pixels(pictures, _SIDE, middle, spread),
            self._device,
        )


class DemoCritic(Backbone):
    """The demo's own judge. Its embedding knows an individual in any setting and pose, so a copy is known by its
    pixels: their correlation."""

    def __init__(self) -> None:
        from lowvram_db.demo.critic import load_critic

        self._critic = load_critic()

    def embed(self, pictures: Sequence[Image.Image]) -> Tensor:
        return self._critic.judge(small(pictures))[3]

    def appearance(self, pictures: Sequence[Image.Image]) -> Tensor:
        pixels = small(pictures).flatten(1)
        return normalize(pixels - pixels.mean(1, keepdim=True), dim=1)

    def agreement(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """The share of class and setting that the critic finds, of those that a prompt names."""
        from lowvram_db.demo.world import NOUNS, SETTINGS

        noun, _, setting, _ = self._critic.judge(small(pictures))
        found = [{NOUNS[n], SETTINGS[s]} for n, s in zip(noun.tolist(), setting.tolist(), strict=True)]
        named = [{word for word in (*NOUNS, *SETTINGS) if f" {word} " in f" {prompt} "} for prompt in prompts]
        shares = [len(a & b) / len(b) if b else 1.0 for a, b in zip(found, named, strict=True)]
        return torch.tensor(shares)

    def unseen_settings(self, photos: Sequence[Image.Image]) -> list[str]:
        """The settings of the world that no photo was taken in."""
        from lowvram_db.demo.world import SETTINGS

        seen = set(self._critic.judge(small(photos))[2].tolist())
        return [setting for number, setting in enumerate(SETTINGS) if number not in seen]


def small(pictures: Sequence[Image.Image]) -> Tensor:
    """As the critic takes them: float32 [N, 3, 64, 64] in [-1, 1]."""
    return _pixels(pictures, 64, (0.5,) * 3, (0.5,) * 3)


def _pixels(pictures: Sequence[Image.Image], side: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Squares -> float32 [N, 3, side, side], in units of std around mean."""
    resized = [picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC) for picture in pictures]
    values = torch.from_numpy(np.stack([np.asarray(picture) for picture in resized])).permute(0, 3, 1, 2).float() / 255
    return (values - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def _embedded(network: Callable[[Tensor], Tensor], pixels: Tensor, device: torch.device) -> Tensor:
    parts = [network(part.to(device)).float().cpu() for part in pixels.split(_AT_ONCE)]
    return normalize(torch.cat(parts), dim=1)
