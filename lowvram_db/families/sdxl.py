"""Stable Diffusion XL: a UNet that also wants a pooled embedding and the picture's size, and two text encoders.

Only what a plan asks for so far.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import CLIPTextModelWithProjection

from lowvram_db.families.blank import blank
from lowvram_db.families.configs import read_text_config
from lowvram_db.families.sd import BlankStableDiffusion

_SIZES = 6  # numbers that tell original size, crop and target size


class BlankStableDiffusionXL(BlankStableDiffusion):
    """A folder that StableDiffusionXLPipeline loads, without weights.

    conditioning: [B, tokens + 1, width], the last row the pooled embedding and the sizes, filled up with zeros.
    """

    addition = "text_time"

    def __init__(self, folder: Path):
        self._text_2 = read_text_config(folder, "text_encoder_2")
        super().__init__(folder)
        tokens, width = self.conditioning_shape
        self.conditioning_shape = tokens + 1, width
        self._pooled: int = self._text_2.projection_dim

    def _text_width(self) -> int:
        return super()._text_width() + self._text_2.hidden_size

    def denoise(self, denoiser: Any, latents: Tensor, timesteps: Tensor, conditioning: Tensor) -> Tensor:
        text, extra = conditioning[:, :-1], conditioning[:, -1]
        added = {"text_embeds": extra[:, : self._pooled], "time_ids": extra[:, self._pooled : self._pooled + _SIZES]}
        return denoiser(latents, timesteps, encoder_hidden_states=text, added_cond_kwargs=added).sample

    def load_text_encoders(self, dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
        second = blank(lambda: CLIPTextModelWithProjection(self._text_2), dtype)
        return super().load_text_encoders(dtype) | {"text_encoder_2": second}

    def conditioning(self, text_encoders: dict[str, Any], rows: int) -> Tensor:
        tokens, width = self.conditioning_shape
        ids = torch.zeros(rows, tokens - 1, dtype=torch.int64)
        first, second = (encoder(ids, output_hidden_states=True) for encoder in text_encoders.values())
        text = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        extra = pad(second.text_embeds, (0, width - self._pooled))
        return torch.cat([text, extra[:, None]], 1)
