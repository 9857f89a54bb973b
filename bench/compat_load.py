"""What a program's networks give on inputs that are always the same, in a process of its own, by a Python that need not
know of lowvram_db: bench/compat.py runs this.

    python bench/compat_load.py PROGRAM JSON
"""

import json
import logging
import sys
from importlib import import_module
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
    """job: file, model (folder), checkout, family, out, and the dtype of the UNet's arithmetic; of the others' it is
    float32. If need be a lora to be put on, and stored, the dtype of a folder that is not in float16."""
    if job["checkout"]:
        sys.path.insert(0, job["checkout"])
    job["dtype"] = getattr(torch, job["dtype"])
    with torch.no_grad():
        outputs = LOADERS[program](job, _inputs(job))
    torch.save({name: tensor.float() for name, tensor in outputs.items()}, job["out"])


def _inputs(job: dict[str, Any]) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    latents, context, pooled = (
        torch.randn(shape, generator=generator)
        for shape in ((1, 4, 32, 32), (1, 77, _CONTEXT[job["family"]]), (1, 1280))
    )
    tokens = torch.randint(0, 49_000, (1, 77), generator=generator)
    tokens[0, -1] = _END
    return Inputs(latents, torch.tensor([500]), context, tokens, pooled)


def _folder(job: dict[str, Any], inputs: Inputs) -> Outputs:
    from diffusers import DiffusionPipeline

    stored = getattr(torch, job.get("stored", "float16"))
    return _of_pipeline(DiffusionPipeline.from_pretrained(job["model"], torch_dtype=stored), job, inputs)


def _diffusers(job: dict[str, Any], inputs: Inputs) -> Outputs:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    kind = StableDiffusionXLPipeline if job["family"] == "sdxl" else StableDiffusionPipeline
    how = {"config": job["model"], "local_files_only": True, "torch_dtype": torch.float16}
    pipeline = kind.from_single_file(job["file"], **how)
    if "lora" in job:
        pipeline.load_lora_weights(job["lora"])
    return _of_pipeline(pipeline, job, inputs)


def _of_pipeline(pipeline: Any, job: dict[str, Any], inputs: Inputs) -> Outputs:
    outputs, added = {"text encoder": _exact(pipeline.text_encoder)(inputs.tokens).last_hidden_state}, {}
    if job["family"] == "sdxl":
        added["text_embeds"], added["time_ids"] = inputs.pooled.to(job["dtype"]), torch.tensor([_SIZES])
        outputs["second, pooled"] = _exact(pipeline.text_encoder_2)(inputs.tokens).text_embeds
    unet, latents, context = _of_unet(pipeline.unet, job, inputs)
    outputs["unet"] = unet(latents, inputs.timestep, context, added_cond_kwargs=added).sample
    return outputs | {"vae": _exact(pipeline.vae).decode(inputs.latents).sample}


def _exact(network: Any) -> Any:
    return network.float().eval()


def _of_unet(unet: Any, job: dict[str, Any], inputs: Inputs) -> tuple[Any, Tensor, Tensor]:
    """It, latents and context in the dtype of its arithmetic."""
    return unet.to(job["dtype"]).eval(), inputs.latents.to(job["dtype"]), inputs.context.to(job["dtype"])


def _without(*names: str) -> None:
    """Packages that a program imports for other work than this need not be there."""
    for name in ("transformers", "diffusers.utils"):  # which would take the stand-ins for what they stand for
        import_module(name)
    for name in names:
        sys.modules[name] = MagicMock()


def _sd_scripts(job: dict[str, Any], inputs: Inputs) -> Outputs:
    _without("torchvision", "torchvision.transforms")
    from library.model_util import load_models_from_stable_diffusion_checkpoint  # type: ignore[import-not-found]

    text, vae, own = load_models_from_stable_diffusion_checkpoint(job["family"] == "sd2", job["file"])
    unet, latents, context = _of_unet(own, job, inputs)
    noise: Any = unet(latents, inputs.timestep, context)
    return {
        "text encoder": _exact(text)(inputs.tokens).last_hidden_state,
        "unet": noise[0] if isinstance(noise, tuple) else noise.sample,
        "vae": _exact(vae).decode(inputs.latents).sample,
    }


def _comfyui(job: dict[str, Any], inputs: Inputs) -> Outputs:
    """On a CPU."""
    _without("torchvision", "torchvision.transforms", "torchaudio", "torchaudio.transforms")
    import comfy.cli_args  # type: ignore[import-not-found]

    comfy.cli_args.args.cpu = True
    import comfy.sd  # type: ignore[import-not-found]

    patcher, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(job["file"], model_options={"dtype": job["dtype"]})
    if "lora" in job:
        patcher, clip = _with_lora(patcher, clip, job["lora"])
    model, texts = patcher.model, clip.cond_stage_model
    outputs, added = {}, {}
    if job["family"] == "sd2":  # whose file may have a layer more than is listened to
        hidden = _exact(texts.clip_h.transformer)(inputs.tokens, intermediate_output=-2)[1]
    else:
        hidden = _exact(texts.clip_l.transformer)(inputs.tokens)[0]
    if job["family"] == "sdxl":
        outputs["second, pooled"] = _exact(texts.clip_g.transformer)(inputs.tokens)[2]
        sizes = torch.cat([model.embedder(torch.tensor([size])) for size in _SIZES]).flatten()[None]
        added["y"] = torch.cat([inputs.pooled, sizes], dim=1).to(job["dtype"])
    unet, latents, context = _of_unet(model.diffusion_model, job, inputs)
    outputs["unet"] = unet(latents, inputs.timestep, context=context, **added)
    return outputs | {"text encoder": hidden, "vae": _exact(vae.first_stage_model).decode(inputs.latents)}


def _with_lora(patcher: Any, clip: Any, path: str) -> tuple[Any, Any]:
    """By ComfyUI's own loader, which only logs what it cannot place. Raises SystemExit for that."""
    import comfy.model_management  # type: ignore[import-not-found]
    import comfy.utils  # type: ignore[import-not-found]

    said: list[str] = []
    logging.getLogger().addHandler(listener := logging.Handler(logging.WARNING))
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    _exact(clip.cond_stage_model)  # it rounds to what it has the weights in
    patcher, clip = comfy.sd.load_lora_for_models(patcher, clip, comfy.utils.load_torch_file(path), 1.0, 1.0)
    comfy.model_management.load_models_gpu([patcher, clip.patcher], force_patch_weights=True)
    if said:
        raise SystemExit(f"{len(said)} of its warnings: {said[0]}")
    return patcher, clip


LOADERS = {"folder": _folder, "diffusers": _diffusers, "sd-scripts": _sd_scripts, "comfyui": _comfyui}


if __name__ == "__main__":
    run_loader(sys.argv[1], json.loads(sys.argv[2]))
