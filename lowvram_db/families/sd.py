"""Stable Diffusion 1.x and 2.x: a UNet over 4-channel latents, one CLIP text encoder, a KL autoencoder."""

import json
import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline
from diffusers import UNet2DConditionModel as UNet
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lowvram_db.errors import UserError
from lowvram_db.families.base import Architecture, Family, Moments
from lowvram_db.families.blank import Blank, blank
from lowvram_db.families.configs import check_unet, read_config, read_schedule
from lowvram_db.families.source import read_json, weight_files
from lowvram_db.families.weights import Narrow, read_narrowed


class StableDiffusionConfigs(Architecture):
    """What the config files of a folder that StableDiffusionPipeline loads tell."""

    denoiser_part = "unet"

    def __init__(self, folder: Path):
        """Read and check the configs; no weights. Raises UserError naming the file that does not fit."""
        self.folder = folder
        unet, vae = (read_config(folder, part, network) for part, network in (("unet", UNet), ("vae", AutoencoderKL)))
        self._text = read_json(folder / "text_encoder" / "config.json", "a Stable Diffusion model folder has one")
        self.latent_channels = vae.get("latent_channels", 4)
        check_unet(folder, unet, self.latent_channels, self._text_width())
        self.latent_side = 2 ** (len(vae["block_out_channels"]) - 1)
        self.checkpoint_steps = 2 * len(unet["down_block_types"]) + 1
        self.native_resolution = unet.get("sample_size", 64) * self.latent_side
        self._scaling_factor: float = vae.get("scaling_factor", 0.18215)
        self.side_multiple = self.latent_side * 2 ** (len(unet["block_out_channels"]) - 1)
        self.noise_schedule = read_schedule(folder)

    def _text_width(self) -> int:
        return self._text.get("hidden_size", 512)

    def denoise(self, denoiser: Any, latents: Tensor, timesteps: Tensor, conditioning: Tensor) -> Tensor:
        return denoiser(latents, timesteps, encoder_hidden_states=conditioning).sample

    def checkpoint_blocks(self, denoiser: Any) -> list[nn.Module]:
        """The UNet's blocks from the finest on: the finer, the more bytes an activation has for the arithmetic it takes
        to make it again. The middle one comes before the coarsest two, which are larger steps of the same kind."""
        *finer, up, down = chain.from_iterable(zip(reversed(denoiser.up_blocks), denoiser.down_blocks, strict=True))
        return [*finer, denoiser.mid_block, up, down]


class BlankStableDiffusion(StableDiffusionConfigs, Blank):
    """Stable Diffusion without weights."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.conditioning_shape = (self._text.get("max_position_embeddings", 77), self._text_width())

    def load_vae(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        return blank(lambda: AutoencoderKL.from_config(AutoencoderKL.load_config(self.folder / "vae")), dtype)

    def load_denoiser(self, narrow: Narrow = lambda weight: weight) -> nn.Module:
        return blank(lambda: UNet.from_config(UNet.load_config(self.folder / "unet")), narrow=narrow)

    def load_text_encoders(self, dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
        return {"text_encoder": blank(lambda: CLIPTextModel(CLIPTextConfig(**self._text)), dtype)}

    def conditioning(self, text_encoders: dict[str, Any], rows: int) -> Tensor:
        tokens = torch.zeros(rows, self.conditioning_shape[0], dtype=torch.int64)
        return text_encoders["text_encoder"](tokens).last_hidden_state


class StableDiffusion(StableDiffusionConfigs, Family):
    """A folder that StableDiffusionPipeline loads."""

    def __init__(self, folder: Path):
        """As StableDiffusionConfigs; and see that weights and tokenizer are there."""
        super().__init__(folder)
        self.vae_files = [folder / "vae" / "config.json", *weight_files(folder, "vae")]
        self._tokenizer = self._load_tokenizer(self._text)
        tokenizer_files = sorted(file for file in (folder / "tokenizer").iterdir() if file.is_file())
        text_files = [folder / "text_encoder" / "config.json", *weight_files(folder, "text_encoder")]
        self.text_files = text_files + tokenizer_files
        unet_files = [folder / "unet" / "config.json", *weight_files(folder, "unet")]
        schedule = folder / "scheduler" / "scheduler_config.json"
        self.model_files = [*unet_files, *self.vae_files, *self.text_files, schedule]

    def _load_tokenizer(self, text: dict[str, Any]) -> Any:
        folder = self.folder / "tokenizer"
        names = {file.name for file in folder.glob("*")}
        # transformers makes an empty tokenizer out of a folder that has none of these, and says nothing
        if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
            raise UserError(f"{folder}: holds no CLIP tokenizer (vocab.json and merges.txt, or tokenizer.json)")
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        if len(tokenizer) > text.get("vocab_size", 49408):
            raise UserError(
                f"{folder}: has {len(tokenizer)} tokens, text_encoder/ knows {text.get('vocab_size')}; "
                "they are of different models"
            )
        return tokenizer

    def load_vae(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        vae = AutoencoderKL.from_pretrained(self.folder, subfolder="vae", dtype=dtype)
        return vae.requires_grad_(False).eval()

    def encode_images(self, vae: Any, pixels: Tensor) -> Moments:
        parameter = next(vae.parameters())
        posterior = vae.encode(pixels.to(parameter.device, parameter.dtype)).latent_dist
        log_scale = torch.log(torch.tensor(self._scaling_factor, dtype=torch.float64)).item()
        # diffusers clamps the log-variance, which would hide that it overflowed
        overflowed = ~posterior.parameters.chunk(2, dim=1)[1].isfinite()
        logvar = posterior.logvar.float().masked_fill(overflowed, torch.nan)
        return Moments(mean=posterior.mean.float() * self._scaling_factor, logvar=logvar + 2 * log_scale)

    def load_text_encoder(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        return CLIPTextModel.from_pretrained(self.folder, subfolder="text_encoder", dtype=dtype).eval()

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
        return text_encoder(tokens.input_ids.to(device)).last_hidden_state

    def load_denoiser(self, narrow: Narrow = lambda weight: weight) -> nn.Module:
        files = weight_files(self.folder, "unet")
        if files[0].suffix == ".safetensors":
            return read_narrowed(UNet, self.folder / "unet", files, narrow)
        unet = UNet.from_pretrained(self.folder, subfolder="unet", dtype=torch.float32).eval()
        for parameter in unet.parameters():
            parameter.data = narrow(parameter.data)
        return unet

    def pipeline(self, dtype: torch.dtype = torch.float32, **parts: Any) -> Any:
        if "unet" not in parts:
            parts["unet"] = self.load_denoiser(lambda weight: weight.to(dtype))
        parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False, **parts}
        pipeline = StableDiffusionPipeline.from_pretrained(self.folder, dtype=dtype, **parts)
        # The model's own schedule under a solver that needs 25-30 steps where the shipped one takes 50.
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def save(self, folder: Path, dtype: torch.dtype, **trained: nn.Module) -> None:
        # Part by part: a whole pipeline beside the trained denoiser would be the most that a run ever holds.
        without = {part: [None, None] for part in ("safety_checker", "feature_extractor")}
        index = read_json(self.folder / "model_index.json", "it names the parts") | without
        text = json.dumps(index | {"requires_safety_checker": False}, indent=2)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model_index.json").write_text(text + "\n", encoding="utf-8")
        for part in ("scheduler", "tokenizer"):
            shutil.copytree(self.folder / part, folder / part, copy_function=shutil.copyfile)
        load = {"vae": self.load_vae, "text_encoder": self.load_text_encoder}
        for part in ("unet", "text_encoder", "vae"):
            module: Any = trained[part] if part in trained else load[part](dtype)
            module.to(dtype=dtype).save_pretrained(folder / part, safe_serialization=True)
