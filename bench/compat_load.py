"""What a program's networks give on inputs that are always the same, in a process of its own, by a Python that need not
know of lowvram_db: bench/compat.py runs this.

    python bench/compat_load.py PROGRAM JSON
"""

import json
import sys
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import torch
from torch import Tensor

_CONTEXT = {"sd1": 768, "sd2": 1024, "sdxl": 2048}
_SIZES = [1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]
_END = 49407  # of a prompt
Outputs = dict[str, Tensor]


class Inputs(NamedTuple):
    latents: Tensor
    timestep: Tensor
    context: Tensor
    tokens: Tensor
    pooled: Tensor


def run_loader(program: str, job: dict[str, Any]) -> None:
    """job: file, model (folder), checkout, family, dtype, out."""
    if job["checkout"]:
        sys.path.insert(0, job["checkout"])
    job["dtype"] = getattr(torch, job["dtype"])
    with torch.no_grad():
        outputs = LOADERS[program](job, _inputs(job))
    torch.save({name: tensor.float() for name, tensor in outputs.items()}, job["out"])


def _inputs(job: dict[str, Any]) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    latents, context, pooled = (
        torch.randn(shape, generator=generator).to(job["dtype"])
        for shape in ((1, 4, 32, 32), (1, 77, _CONTEXT[job["family"]]), (1, 1280))
    )
    tokens = torch.randint(0, 49_000, (1, 77), generator=generator)
    tokens[0, -1] = _END
    return Inputs(latents, torch.tensor([500]), context, tokens, pooled)


def _folder(job: dict[str, Any], inputs: Inputs) -> Outputs:
    from diffusers import DiffusionPipeline

    return _of_pipeline(DiffusionPipeline.from_pretrained(job["model"], torch_dtype=torch.float16), job, inputs)


def _diffusers(job: dict[str, Any], inputs: Inputs) -> Outputs:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    kind = StableDiffusionXLPipeline if job["family"] == "sdxl" else StableDiffusionPipeline
    how = {"config": job["model"], "local_files_only": True, "torch_dtype": torch.float16}
    return _of_pipeline(kind.from_single_file(job["file"], **how), job, inputs)


def _of_pipeline(pipeline: Any, job: dict[str, Any], inputs: Inputs) -> Outputs:
    unet, vae, text = (
        network.to(job["dtype"]).eval() for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    )
    added: dict[str, Any] = {}
    outputs = {"text encoder": text(inputs.tokens).last_hidden_state}
    if job["family"] == "sdxl":
        added = {"added_cond_kwargs": {"text_embeds": inputs.pooled, "time_ids": torch.tensor([_SIZES])}}
        outputs["second, pooled"] = pipeline.text_encoder_2.to(job["dtype"]).eval()(inputs.tokens).text_embeds
    noise = unet(inputs.latents, inputs.timestep, inputs.context, **added).sample
    return outputs | {"unet": noise, "vae": vae.decode(inputs.latents).sample}


def _sd_scripts(job: dict[str, Any], inputs: Inputs) -> Outputs:
    from library.model_util import load_models_from_stable_diffusion_checkpoint  # type: ignore[import-not-found]

    loaded = load_models_from_stable_diffusion_checkpoint(job["family"] == "sd2", job["file"])
    text, vae, unet = (network.to(job["dtype"]).eval() for network in loaded)
    noise: Any = unet(inputs.latents, inputs.timestep, inputs.context)
    return {
        "text encoder": text(inputs.tokens).last_hidden_state,
        "unet": noise[0] if isinstance(noise, tuple) else noise.sample,
        "vae": vae.decode(inputs.latents).sample,
    }


def _comfyui(job: dict[str, Any], inputs: Inputs) -> Outputs:
    """On a CPU. It imports two packages for models of other kinds; they need not be there."""
    import transformers  # noqa: F401, which would take the stand-ins for what they stand for

    for name in ("torchvision", "torchvision.transforms", "torchaudio", "torchaudio.transforms"):
        sys.modules[name] = MagicMock()
    import comfy.cli_args  # type: ignore[import-not-found]

    comfy.cli_args.args.cpu = True
    import comfy.sd  # type: ignore[import-not-found]

    patcher, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(job["file"], model_options={"dtype": job["dtype"]})
    model, texts = patcher.model, clip.cond_stage_model
    unet, decoder = (network.to(job["dtype"]).eval() for network in (model.diffusion_model, vae.first_stage_model))
    outputs, added = {}, {}
    if job["family"] == "sd2":  # whose file may have a layer more than is listened to
        hidden = texts.clip_h.transformer.to(job["dtype"])(inputs.tokens, intermediate_output=-2, dtype=job["dtype"])[1]
    else:
        hidden = texts.clip_l.transformer.to(job["dtype"])(inputs.tokens, dtype=job["dtype"])[0]
    if job["family"] == "sdxl":
        outputs["second, pooled"] = texts.clip_g.transformer.to(job["dtype"])(inputs.tokens, dtype=job["dtype"])[2]
        sizes = torch.cat([model.embedder(torch.tensor([size])) for size in _SIZES]).flatten()[None]
        added["y"] = torch.cat([inputs.pooled, sizes.to(job["dtype"])], dim=1)
    noise = unet(inputs.latents, inputs.timestep, context=inputs.context, **added)
    return outputs | {"text encoder": hidden, "unet": noise, "vae": decoder.decode(inputs.latents)}


LOADERS = {"folder": _folder, "diffusers": _diffusers, "sd-scripts": _sd_scripts, "comfyui": _comfyui}


if __name__ == "__main__":
    run_loader(sys.argv[1], json.loads(sys.argv[2]))
