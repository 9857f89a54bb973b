"""Stable Diffusion XL: a UNet that also wants a pooled embedding and the picture's sizes, and two text encoders."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from lowvram_db.errors import UserError
from lowvram_db.families.conditioning import Conditioning
from lowvram_db.families.sd import BlankStableDiffusion, StableDiffusion, StableDiffusionConfigs
from lowvram_db.files.foreign import read_json

if TYPE_CHECKING:
    from lowvram_db.framing import View

_SIZES = 6  # numbers that tell a picture's original size, crop corner and target size


class StableDiffusionXLConfigs(StableDiffusionConfigs):
    """What the config files of a folder that StableDiffusionXLPipeline loads tell.

    conditioning: "text" [B, tokens, width], "pooled" [B, pooled width], and "sizes", int64 [B, 6]: original height and
    width, the crop's top and left, target height and width, in pixels (Podell et al. 2023, section 2.2).
    """

    text_networks: Mapping[str, type[Any]] = MappingProxyType(
        {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    )
    addition = "text_time"

    def __init__(self, folder: Path, prediction_type: str | None = None):
        super().__init__(folder, prediction_type)
        self._pooled: int = self._texts["text_encoder_2"].projection_dim
        wanted, sizes = self._unet["projection_class_embeddings_input_dim"], self._unet["addition_time_embed_dim"]
        if sizes is None or wanted != self._pooled + _SIZES * sizes:
            raise UserError(
                f"{folder / 'unet' / 'config.json'}: projection_class_embeddings_input_dim is {wanted!r}, and text_"
                f"encoder_2's {self._pooled} and {_SIZES} sizes of {sizes!r} are given; they are of different models"
            )

    def read(self, text_encoders: Mapping[str, Any], tokens: Mapping[str, Tensor]) -> Conditioning:
        first, second = (encoder(tokens[part], output_hidden_states=True) for part, encoder in text_encoders.items())
        text = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        return {"text": text, "pooled": second.text_embeds}

    def view_conditioning(self, view: "View") -> Conditioning:
        sizes = [number for width, height in (view.photo, view.corner, view.size) for number in (height, width)]
        return {"sizes": torch.tensor(sizes)}

    def denoise(self, denoiser: Any, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        added = {"text_embeds": conditioning["pooled"], "time_ids": conditioning["sizes"]}
        text = conditioning["text"]
        return denoiser(latents, timesteps, encoder_hidden_states=text, added_cond_kwargs=added).sample

    def trainable(self, part: str, network: nn.Module) -> dict[str, nn.Parameter]:
        """Without what comes after the first text encoder's last layer but one, to which nobody listens."""
        parameters = super().trainable(part, network)
        if part != "text_encoder":
            return parameters
        idle = f"layers.{self._texts[part].num_hidden_layers - 1}.", "final_layer_norm."
        return {name: parameter for name, parameter in parameters.items() if not any(word in name for word in idle)}


class BlankStableDiffusionXL(StableDiffusionXLConfigs, BlankStableDiffusion):
    """Stable Diffusion XL without weights."""

    def __init__(self, folder: Path, prediction_type: str | None = None):
        super().__init__(folder, prediction_type)
        self.text_shapes["pooled"] = (self._pooled,)


class StableDiffusionXL(StableDiffusionXLConfigs, StableDiffusion):
    """A folder that StableDiffusionXLPipeline loads."""

    pipeline_class = StableDiffusionXLPipeline

    def __init__(self, folder: Path, prediction_type: str | None = None):
        super().__init__(folder, prediction_type)
        index = read_json(folder / "model_index.json", "it names the parts")
        # Without a prompt this model was trained on zeros, not on what the encoders make of an empty one.
        self._zeros = bool(index.get("force_zeros_for_empty_prompt", True))
        self.index_settings = {"force_zeros_for_empty_prompt": self._zeros}
        self.pipeline_settings = {**self.index_settings, "add_watermarker": False}

    def sampling_inputs(self, conditioning: Conditioning) -> dict[str, Any]:
        inputs = super().sampling_inputs(conditioning)
        inputs["pooled_prompt_embeds"], inputs["negative_pooled_prompt_embeds"] = conditioning["pooled"].split(1)
        if self._zeros:
            for name in ("negative_prompt_embeds", "negative_pooled_prompt_embeds"):
                inputs[name] = torch.zeros_like(inputs[name])
        return inputs
