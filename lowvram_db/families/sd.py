"""Stable Diffusion 1.x and 2.x: a UNet over 4-channel latents, one CLIP text encoder, a KL autoencoder."""

import json
import shutil
from collections.abc import Mapping
from functools import partial
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
from lowvram_db.families.conditioning import Conditioning
from lowvram_db.families.configs import (
    check_index,
    check_unet,
    check_vae,
    latents_a_side,
    read_config,
    read_text_config,
)
from lowvram_db.families.finished import save_network
from lowvram_db.families.schedule import of_few_steps, read_schedule, schedule_file, solver
from lowvram_db.families.weights import Narrow, read_weights
from lowvram_db.files.foreign import naming, read_json
from lowvram_db.files.stand_in import refuse_stand_in
from lowvram_db.formats.weight_files import weight_files
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

# How much of the contrast that guidance adds is taken back where a schedule ends in nothing but noise: the phi of Lin
# et al. 2024, section 3.4.
_GUIDANCE_RESCALE = 0.7


class StableDiffusionConfigs(Architecture):
    """What the config files of a folder that StableDiffusionPipeline loads tell."""

    denoiser_part = "unet"
    text_networks: Mapping[str, type[Any]] = MappingProxyType({"text_encoder": CLIPTextModel})
    addition: str | None = None  # the kind of embeddings that the UNet gets beside the prompt's

    def __init__(self, folder: Path, prediction_type: str | None = None):
        """Read and check the configs; no weights. prediction_type: what the UNet predicts, whatever the scheduler's
        config says. Raises UserError naming the file that does not fit."""
        self.folder, self._prediction_type = folder, prediction_type
        self.tokenizer_folders = {part: part.replace("text_encoder", "tokenizer") for part in self.text_networks}
        networks = {"unet": UNet, "vae": AutoencoderKL, **self.text_networks}
        self.named_parts = (*networks, *self.tokenizer_folders.values(), "scheduler")
        check_index(folder, networks, self.named_parts[len(networks) :])
        self._unet, self._vae = (read_config(folder, *part) for part in (("unet", UNet), ("vae", AutoencoderKL)))
        self._texts = {part: read_text_config(folder, part) for part in self.text_networks}
        self.latent_channels = self._vae["latent_channels"]
        check_vae(folder, self._vae)
        check_unet(folder, self._unet, self.latent_channels, self._text_widths(), self.addition)
        self.latent_side = 2 ** (len(self._vae["block_out_channels"]) - 1)
        self.checkpoint_steps = 2 * len(self._unet["down_block_types"]) + (self._unet["mid_block_type"] is not None)
        self.native_resolution = latents_a_side(folder, self._unet) * self.latent_side
        self._scaling_factor: float = self._vae["scaling_factor"]
        self.side_multiple = self.latent_side * 2 ** (len(self._unet["block_out_channels"]) - 1)
        self.noise_schedule = read_schedule(folder, prediction_type)

    def _text_widths(self) -> list[int]:
        return [text.hidden_size for text in self._texts.values()]

    def _build_vae(self) -> Any:
        return AutoencoderKL.from_config(self._vae)

    def _build_denoiser(self) -> Any:
        return UNet.from_config(self._unet)

    def _build_text_encoder(self, part: str) -> Any:
        return self.text_networks[part](self._texts[part])

    def read(self, text_encoders: Mapping[str, Any], tokens: Mapping[str, Tensor]) -> Conditioning:
        """What the text encoders make of each one's tokens, int64 [B, tokens]."""
        return {"text": text_encoders["text_encoder"](tokens["text_encoder"]).last_hidden_state}

    def denoise(self, denoiser: Any, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        return denoiser(latents, timesteps, encoder_hidden_states=conditioning["text"]).sample

    def checkpoint_blocks(self, denoiser: Any) -> list[nn.Module]:
        """The UNet's blocks from the finest on: the finer, the more bytes an activation has for the arithmetic it takes
        to make it again. The middle one comes before the coarsest two, which are larger steps of the same kind;
        distilled UNets can be without."""
        *finer, up, down = chain.from_iterable(zip(reversed(denoiser.up_blocks), denoiser.down_blocks, strict=True))
        middle = [] if denoiser.mid_block is None else [denoiser.mid_block]
        return [*finer, *middle, up, down]


class BlankStableDiffusion(StableDiffusionConfigs, Blank):
    """Stable Diffusion without weights."""

    def __init__(self, folder: Path, prediction_type: str | None = None):
        super().__init__(folder, prediction_type)
        longest = max(text.max_position_embeddings for text in self._texts.values())
        self.text_shapes = {"text": (longest, sum(self._text_widths()))}

    def load_vae(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        return blank(self._build_vae, dtype)

    def load_denoiser(self, narrow: Narrow = lambda weight: weight) -> nn.Module:
        return blank(self._build_denoiser, narrow=narrow)

    def load_text_encoders(self, dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
        return {part: blank(partial(self._build_text_encoder, part), dtype) for part in self.text_networks}

    def encode_prompts(self, text_encoders: Mapping[str, Any], prompts: list[str]) -> Conditioning:
        tokens = {
            part: torch.zeros(len(prompts), text.max_position_embeddings, dtype=torch.int64)
            for part, text in self._texts.items()
        }
        return self.read(text_encoders, tokens)


class StableDiffusion(StableDiffusionConfigs, Family):
    """A folder that StableDiffusionPipeline loads."""

    pipeline_class: Any = StableDiffusionPipeline
    pipeline_settings: Mapping[str, Any] = MappingProxyType(
        {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    )
    index_settings: Mapping[str, Any] = MappingProxyType(
        {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    )  # the same in model_index.json

    def __init__(self, folder: Path, prediction_type: str | None = None):
        """As StableDiffusionConfigs; and see that weights and tokenizers are there."""
        super().__init__(folder, prediction_type)
        self._weights = {part: weight_files(folder, part) for part in ("unet", "vae", *self.text_networks)}
        self._tokenizers, self.text_files = {}, []
        for part, name in self.tokenizer_folders.items():
            files = [file for stem in _TOKENIZER_FILES if (file := folder / name / stem).is_file()]
            self._tokenizers[part] = self._load_tokenizer(part, files)
            self.text_files += [*self._files_of(part), *files]
        self.vae_files = self._files_of("vae")
        self.model_files = [*self._files_of("unet"), *self.vae_files, *self.text_files, schedule_file(folder)]
        self.remarks = [distilled] if (distilled := of_few_steps(folder)) else []

    def _files_of(self, part: str) -> list[Path]:
        return [self.folder / part / "config.json", *self._weights[part]]

    def _load_tokenizer(self, part: str, files: list[Path]) -> Any:
        folder, names = self.folder / self.tokenizer_folders[part], {file.name for file in files}
        text = self._texts[part]
        # transformers makes an empty tokenizer out of a folder that has none of these, and says nothing
        if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
            raise UserError(f"{folder}: holds no CLIP tokenizer (vocab.json and merges.txt, or tokenizer.json)")
        for file in files:
            refuse_stand_in(file)
        with naming(folder, "its CLIP tokenizer cannot be read"):
            tokenizer = CLIPTokenizer.from_pretrained(folder)
            # a tokenizer whose config does not say it has no limit
            tokenizer.model_max_length = min(tokenizer.model_max_length, text.max_position_embeddings)
            tokenizer("")
        if len(tokenizer) > text.vocab_size:
            raise UserError(
                f"{folder}: has {len(tokenizer)} tokens, {part}/ knows {text.vocab_size}; they are of different models"
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

    def decode_latents(self, vae: Any, latents: Tensor) -> Tensor:
        parameter = next(vae.parameters())
        scaled = latents.to(parameter.device, parameter.dtype) / self._scaling_factor
        return vae.decode(scaled, return_dict=False)[0].float()

    def load_text_encoders(self, dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
        return {part: self._load_text_encoder(part, dtype) for part in self.text_networks}

    def _load_text_encoder(self, part: str, dtype: torch.dtype) -> nn.Module:
        build = partial(self._build_text_encoder, part)
        encoder: Any = read_weights(build, self._weights[part], lambda weight: weight.to(dtype))
        self.tune(part, encoder)
        return encoder

    def check_prompts(self, prompts: list[str]) -> None:
        for tokenizer in self._tokenizers.values():
            limit = tokenizer.model_max_length
            for prompt in prompts:
                length = len(tokenizer(prompt).input_ids)
                if length > limit:
                    raise UserError(f"prompt {prompt!r}: {length} tokens, the model reads {limit}; shorten it")

    def encode_prompts(self, text_encoders: Mapping[str, Any], prompts: list[str]) -> Conditioning:
        tokens = {}
        for part, tokenizer in self._tokenizers.items():
            length = tokenizer.model_max_length
            read = tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
            tokens[part] = sent(read.input_ids, next(text_encoders[part].parameters()).device)
        return self.read(text_encoders, tokens)

    def load_denoiser(self, narrow: Narrow = lambda weight: weight) -> nn.Module:
        denoiser: Any = read_weights(self._build_denoiser, self._weights["unet"], narrow)
        self.tune("unet", denoiser)
        return denoiser

    def sampler(self, denoiser: Any) -> Any:
        nothing = dict.fromkeys(["vae", *self.text_networks, *self.tokenizer_folders.values()])
        pipeline = self._pipeline(unet=denoiser, **nothing)
        pipeline.vae_scale_factor = self.latent_side  # which it else asks its VAE for
        return pipeline

    def sampling_inputs(self, conditioning: Conditioning) -> dict[str, Any]:
        prompt, no_prompt = conditioning["text"].split(1)
        rescale = _GUIDANCE_RESCALE if self.noise_schedule.ends_in_noise else 0.0
        return {"prompt_embeds": prompt, "negative_prompt_embeds": no_prompt, "guidance_rescale": rescale}

    def pipeline(self, dtype: torch.dtype = torch.float32, **parts: Any) -> Any:
        if not self.text_networks.keys() <= parts.keys():
            parts = {**self.load_text_encoders(dtype), **parts}
        if "unet" not in parts:
            parts["unet"] = self.load_denoiser(lambda weight: weight.to(dtype))
        if "vae" not in parts:
            parts["vae"] = self.load_vae(dtype)
        tokenizers = {name: self._tokenizers[part] for part, name in self.tokenizer_folders.items()}
        pipeline = self._pipeline(**{**tokenizers, **parts})
        pipeline.vae.enable_slicing()  # one picture after the other: pixels take more memory than all the rest
        return pipeline

    def _pipeline(self, **parts: Any) -> Any:
        pipeline = self.pipeline_class(
            **parts, **self.pipeline_settings, scheduler=solver(self.folder, self._prediction_type)
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def save(
        self, folder: Path, dtype: torch.dtype, written: Mapping[str, Path] = MappingProxyType({}), **trained: nn.Module
    ) -> None:
        # Part by part: a whole pipeline beside the trained denoiser would be the most that a run ever holds.
        index = read_json(self.folder / "model_index.json", "it names the parts")
        kept = {key: index[key] for key in ("_class_name", *self.named_parts)} | {**self.index_settings}
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / "model_index.json", kept)
        for part in ("scheduler", *self.tokenizer_folders.values()):
            shutil.copytree(self.folder / part, folder / part, copy_function=shutil.copyfile)
        if self._prediction_type is not None:
            schedule = read_json(schedule_file(folder), "it has just been copied")
            _write_json(schedule_file(folder), schedule | {"prediction_type": self._prediction_type})
        for part, network in trained.items():
            save_network(network, folder / part, dtype, written.get(part))
        for part in self.text_networks:
            if part not in trained:
                save_network(self._load_text_encoder(part, torch.float32), folder / part, dtype)
        save_network(self.load_vae(), folder / "vae", dtype)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
