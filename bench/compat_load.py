"""What a program's networks give on inputs that are always the same, in a process of its own, by a Python that need not
know of lowvram_db: bench/compat.py runs this.

    python bench/compat_load.py PROGRAM JSON
"""

import json
import sys
from typing import Any

import torch


def run_loader(program: str, job: dict[str, Any]) -> None:
    """In a process of its own: what a program's networks give."""
    if job["checkout"]:
        sys.path.insert(0, job["checkout"])
    unet, text_encoder, vae = (network.float().eval() for network in LOADERS[program](job))
    generator = torch.Generator().manual_seed(0)
    latents, context = (torch.randn(shape, generator=generator) for shape in ((1, 4, 32, 32), (1, 77, 768)))
    tokens = torch.randint(0, 49_000, (1, 77), generator=generator)
    with torch.no_grad():
        noise: Any = unet(latents, torch.tensor([500]), context)
        outputs = {
            "unet": noise[0] if isinstance(noise, tuple) else noise.sample,
            "text encoder": text_encoder(tokens).last_hidden_state,
            "vae": vae.decode(latents).sample,
        }
    torch.save(outputs, job["out"])


def _folder(job: dict[str, Any]) -> tuple[Any, ...]:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(job["model"], torch_dtype=torch.float16)
    vae = StableDiffusionPipeline.from_pretrained(job["model"], unet=None, text_encoder=None).vae
    return pipeline.unet, pipeline.text_encoder, vae


def _diffusers(job: dict[str, Any]) -> tuple[Any, ...]:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_single_file(job["file"], config=job["model"], local_files_only=True)
    return pipeline.unet, pipeline.text_encoder, pipeline.vae


def _sd_scripts(job: dict[str, Any]) -> tuple[Any, ...]:
    from library.model_util import load_models_from_stable_diffusion_checkpoint  # type: ignore[import-not-found]

    text_encoder, vae, unet = load_models_from_stable_diffusion_checkpoint(False, job["file"])
    return unet, text_encoder, vae


LOADERS = {"folder": _folder, "diffusers": _diffusers, "sd-scripts": _sd_scripts}


if __name__ == "__main__":
    run_loader(sys.argv[1], json.loads(sys.argv[2]))
