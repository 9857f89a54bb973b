"""Stable Diffusion 1.x and 2.x: a UNet over 4-channel latents, one CLIP text encoder, a KL autoencoder."""

import json
import shutil
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers import UNet2DConditionModel as UNet
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from lowvram_db.errors import UserError
from lowvram_db.families.base import Architecture, Family, Moments
from lowvram_db.families.blank import Blank, blank
from lowvram_db.families.configs import (
    NAMED_PARTS,
    check_index,
    check_unet,
    check_vae,
    latents_a_side,
    read_config,
    read_text_config,
)
from lowvram_db.families.finished import save_network
from lowvram_db.families.schedule import read_schedule, solver
from lowvram_db.families.source import naming, read_json
from lowvram_db.families.weight_files import refuse_stand_in, weight_files
from lowvram_db.families.weights import Narrow, read_weights
from lowvram_db.memory.device import sent

# What CLIPTokenizer.from_pretrained reads.
_TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)


class StableDiffusionConfigs(Architecture):
    """What the config files of a folder that StableDiffusionPipeline loads tell."""

    denoiser_part = "unet"
    addition: str | None = None  # the kind of embeddings that the UNet gets beside the prompt's

    def __init__(self, folder: Path):
        """Read and check the configs; no weights. Raises UserError naming the file that does not fit."""
        self.folder = folder
        check_index(folder)
        self._unet, self._vae = (read_config(folder, *part) for part in (("unet", UNet), ("vae", AutoencoderKL)))
        self._text = read_text_config(folder, "text_encoder")
        self.latent_channels = self._vae["latent_channels"]
        check_vae(folder, self._vae)
        check_unet(folder, self._unet, self.latent_channels, self._text_width(), self.addition)
        self.latent_side = 2 ** (len(self._vae["block_out_channels"]) - 1)
        self.checkpoint_steps = 2 * len(self._unet["down_block_types"]) + (self._unet["mid_block_type"] is not None)
        self.native_resolution = latents_a_side(folder, self._unet) * self.latent_side
        self._scaling_factor: float = self._vae["scaling_factor"]
        self.side_multiple = self.latent_side * 2 ** (len(self._unet["block_out_channels"]) - 1)
        self.noise_schedule = read_schedule(folder)

    def _text_width(self) -> int:
        return self._text.hidden_size

    def _build_vae(self) -> Any:
        return AutoencoderKL.from_config(self._vae)

    def _build_denoiser(self) -> Any:
        return UNet.from_config(self._unet)

    def _build_text_encoder(self) -> Any:
        return CLIPTextModel(self._text)

    def denoise(self, denoiser: Any, latents: Tensor, timesteps: Tensor, conditioning: Tensor) -> Tensor:
        return denoiser(latents, timesteps, encoder_hidden_states=conditioning).sample

    def checkpoint_blocks(self, denoiser: Any) -> list[nn.Module]:
        """The UNet's blocks from the finest on: the finer, the more bytes an activation has for the arithmetic it takes
        to make it again. The middle one comes before the coarsest two, which are larger steps of the same kind;
        distilled UNets can be without."""
        *finer, up, down = chain.from_iterable(zip(reversed(denoiser.up_blocks), denoiser.down_blocks, strict=True))
        middle = [] if denoiser.mid_block is None else [denoiser.mid_block]
        return [*finer, *middle, up, down]


class BlankStableDiffusion(StableDiffusionConfigs, Blank):
    """Stable Diffusion without weights."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.conditioning_shape = (self._text.max_position_embeddings, self._text_width())

    def load_vae(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        return blank(self._build_vae, dtype)

    def load_denoiser(self, narrow: Narrow = lambda weight: weight) -> nn.Module:
        return blank(self._build_denoiser, narrow=narrow)

    def load_text_encoders(self, dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
        return {"text_encoder": blank(self._build_text_encoder, dtype)}

    def conditioning(self, text_encoders: dict[str, Any], rows: int) -> Tensor:
        tokens = torch.zeros(rows, self.conditioning_shape[0], dtype=torch.int64)
        return text_encoders["text_encoder"](tokens).last_hidden_state


class StableDiffusion(StableDiffusionConfigs, Family):
    """A folder that StableDiffusionPipeline loads."""

    def __init__(self, folder: Path):
        """As StableDiffusionConfigs; and see that weights and tokenizer are there."""
        super().__init__(folder)
        self._weights = {part: weight_files(folder, part) for part in ("unet", "vae", "text_encoder")}
        tokenizer_files = [folder / "tokenizer" / name for name in _TOKENIZER_FILES]
        tokenizer_files = [file for file in tokenizer_files if file.is_file()]
        self._tokenizer = self._load_tokenizer(tokenizer_files)
        self.vae_files = self._files_of("vae")
        self.text_files = [*self._files_of("text_encoder"), *tokenizer_files]
        schedule = folder / "scheduler" / "scheduler_config.json"
        self.model_files = [*self._files_of("unet"), *self.vae_files, *self.text_files, schedule]

    def _files_of(self, part: str) -> list[Path]:
        return [self.folder / part / "config.json", *self._weights[part]]

    def _load_tokenizer(self, files: list[Path]) -> Any:
        folder, names = self.folder / "tokenizer", {file.name for file in files}
        # transformers makes an empty tokenizer out of a folder that has none of these, and says nothing
        if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
            raise UserError(f"{folder}: holds no CLIP tokenizer (vocab.json and merges.txt, or tokenizer.json)")
        for file in files:
            refuse_stand_in(file)
        with naming(folder, "its CLIP tokenizer cannot be read"):
            tokenizer = CLIPTokenizer.from_pretrained(folder)
            # a tokenizer whose config does not say it has no limit
            tokenizer.model_max_length = min(tokenizer.model_max_length, self._text.max_position_embeddings)
            tokenizer("")
        if len(tokenizer) > self._text.vocab_size:
            raise UserError(
                f"{folder}: has {len(tokenizer)} tokens, text_encoder/ knows {self._text.vocab_size}; "
                "they are of different models"
            )
        return tokenizer

    def load_vae(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        vae = read_weights(self._build_vae, self._weights["vae"], lambda weight: weight.to(dtype))
        return vae.requires_grad_(False)

    def encode_images(self, vae: Any, pixels: Tensor) -> Moments:
        parameter = next(vae.parameters())
        posterior = vae.encode(pixels.to(parameter.device, parameter.dtype)).latent_dist
        log_scale = torch.log(torch.tensor(self._scaling_factor, dtype=torch.float64)).item()
        # diffusers clamps the log-variance, which would hide that it overflowed
        overflowed = ~posterior.parameters.chunk(2, dim=1)[1].isfinite()
        logvar = posterior.logvar.float().masked_fill(overflowed, torch.nan)
        return Moments(mean=posterior.mean.float() * self._scaling_factor, logvar=logvar + 2 * log_scale)

    def load_text_encoder(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        return read_weights(self._build_text_encoder, self._weights["text_encoder"], lambda weight: weight.to(dtype))

    def check_prompts(self, prompts: list[str]) -> None:
        limit = self._tokenizer.model_max_length
        for prompt in prompts:
            length = len(self._tokenizer(prompt).input_ids)
            if length > limit:
                raise UserError(f"prompt {prompt!r}: {length} tokens, the model reads {limit}; shorten it")

    def encode_prompts(self, text_encoder: Any, prompts: list[str]) -> Tensor:
        tokens = self._tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=self._tokenizer.model_max_length,
            return_tensors="pt",
        )
        device = next(text_encoder.parameters()).device
        return text_encoder(sent(tokens.input_ids, device)).last_hidden_state

    def load_denoiser(self, narrow: Narrow = lambda weight: weight) -> nn.Module:
        return read_weights(self._build_denoiser, self._weights["unet"], narrow)

    def pipeline(self, dtype: torch.dtype = torch.float32, **parts: Any) -> Any:
        load = {
            "unet": lambda: self.load_denoiser(lambda weight: weight.to(dtype)),
            "vae": lambda: self.load_vae(dtype),
            "text_encoder": lambda: self.load_text_encoder(dtype),
        }
        parts |= {part: load[part]() for part in load if part not in parts}
        pipeline = StableDiffusionPipeline(
            **{"tokenizer": self._tokenizer, **parts},
            scheduler=solver(self.folder),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        pipeline.vae.enable_slicing()  # one picture after the other: pixels take more memory than all the rest
        return pipeline

    def save(
        self, folder: Path, dtype: torch.dtype, written: Mapping[str, Path] = MappingProxyType({}), **trained: nn.Module
    ) -> None:
        # Part by part: a whole pipeline beside the trained denoiser would be the most that a run ever holds.
        without: dict[str, Any] = {part: [None, None] for part in ("safety_checker", "feature_extractor")}
        index = read_json(self.folder / "model_index.json", "it names the parts")
        kept = {key: index[key] for key in ("_class_name", *NAMED_PARTS)} | without
        text = json.dumps(kept | {"requires_safety_checker": False}, indent=2)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model_index.json").write_text(text + "\n", encoding="utf-8")
        for part in ("scheduler", "tokenizer"):
            shutil.copytree(self.folder / part, folder / part, copy_function=shutil.copyfile)
        load: dict[str, Callable[[], nn.Module]] = {"vae": self.load_vae, "text_encoder": self.load_text_encoder}
        for part in ("unet", "text_encoder", "vae"):
            network = trained[part] if part in trained else load[part]()
            save_network(network, folder / part, dtype, written.get(part))
