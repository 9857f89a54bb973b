"""Does an exported file open elsewhere, and what do writing and opening it cost?

    python bench/compat.py
    python bench/compat.py --sd-scripts .../sd-scripts

A Stable Diffusion 1.5 of its true size with random weights is exported in fp16, and each program's own loader opens the
file; UNet, text encoder and VAE are called on the same inputs, in float32, and compared with the folder that the file
was made of. A checkout's loader runs under the Python of its own virtual environment (`venv` or `.venv` in it), or else
under this one. Rows go to bench/results/compat.csv.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from full_size import measure, prepare
from machine import add_row
from peers import commit_of, python_of
from torch import Tensor

_ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sd-scripts", type=Path, help="checkout of kohya-ss/sd-scripts")
    parser.add_argument("--as-program", choices=list(LOADERS), help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_program:
        run_loader(options.as_program, json.loads(options.job))
        return
    model = prepare(_ROOT / "runs" / "sd15-random").parent / "model"
    with tempfile.TemporaryDirectory(dir=model.parent) as place:
        file = Path(place) / "model.safetensors"
        words = ["export", str(model), "--out", str(file), "--dtype", "fp16"]
        seconds, peak, _ = measure(["lowvram-db", *words])
        report("export to fp16", "-", seconds, peak)
        for program, checkout in {"folder": None, "diffusers": None, "sd-scripts": options.sd_scripts}.items():
            if program in ("folder", "diffusers") or checkout:
                compare(program, checkout, model, file, Path(place))


def compare(program: str, checkout: Path | None, model: Path, file: Path, place: Path) -> None:
    """One program's row: how far what its networks give is from what the folder's do ("folder" makes the reference)."""
    out = place / f"{program}.pt"
    job = {"file": str(file), "model": str(model), "checkout": str(checkout or ""), "out": str(out)}
    python = python_of(checkout / "train_db.py") if checkout else sys.executable
    command = [python, __file__, "--as-program", program, "--job", json.dumps(job)]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    seconds = time.monotonic() - began
    if done.returncode:
        report(f"open in {program}", (done.stderr.strip().splitlines() or ["no word"])[-1][:120], seconds, 0, checkout)
        return
    if program == "folder":
        return
    outputs, reference = torch.load(out), torch.load(place / "folder.pt")
    said = ", ".join(f"{part} {furthest(outputs[part], reference[part]):.0e}" for part in reference)
    report(f"open in {program}", said, seconds, 0, checkout)


def furthest(one: Tensor, other: Tensor) -> float:
    """The largest difference, in units of the largest number."""
    return ((one - other).abs().max() / other.abs().max()).item()


def report(what: str, difference: str, seconds: float, peak: int, checkout: Path | None = None) -> None:
    row = {
        "what": what + (f" {commit_of(checkout / 'train_db.py')}" if checkout else ""),
        "model": "SD 1.5 shape, random weights, fp16",
        "largest difference of outputs": difference,
        "seconds": f"{seconds:.1f}",
        "peak_gib": f"{peak / 2**30:.2f}" if peak else "-",
    }
    add_row("compat", row)
    print(", ".join(f"{key}: {value}" for key, value in row.items()), flush=True)


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
    main()
