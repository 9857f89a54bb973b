"""Does an exported file open elsewhere, and what do writing and opening it cost?

    python bench/compat.py
    python bench/compat.py --family sdxl --sd-scripts .../sd-scripts --comfyui .../ComfyUI
    python bench/compat.py --only first-step

A model of its family's true sizes with random weights in fp16 is exported, and each program's own loader opens the
file; UNet, text encoders and VAE are called on the same inputs, and compared with the folder that the file was made of.
So are they with a LoRA on every layer that one can name, beside a folder that `lowvram-db merge` has put it into.
A checkout's loader runs under the Python of its own virtual environment (`venv` or `.venv` in it), or else under this
one; ComfyUI's wants einops, torchsde, scipy, av and sentencepiece, but neither torchvision nor torchaudio. Rows go to
bench/results/compat.csv. SDXL takes 11 GB of disk, and up to 9 GiB of memory.
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
from first_step import first_steps
from full_size import measure
from machine import add_row
from peers import commit_of, python_of
from torch import Tensor
from true_size import write_true_size

from lowvram_db.families import open_blank
from lowvram_db.formats.export import describe_lora
from lowvram_db.formats.lora_file import write_lora
from lowvram_db.formats.merge import merge
from lowvram_db.formats.stored import open_stored
from lowvram_db.sections import MethodConfig
from lowvram_db.train.adapter import adapt, lora_of_networks

_LOADER = Path(__file__).with_name("compat_load.py")
_NAMES = {"sd1": "SD 1.5", "sd2": "SD 2.1", "sdxl": "SDXL"}
_UNET_IN = {"sd1": "float32", "sd2": "float32", "sdxl": "bfloat16"}  # so that no network takes 10 GB
_PAIRS = 3
_PARTS = ("export", "load", "first-step", "open", "lora")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=[*_NAMES], default="sd1")
    parser.add_argument("--only", choices=_PARTS)
    parser.add_argument("--sd-scripts", type=Path, help="checkout of kohya-ss/sd-scripts")
    parser.add_argument("--comfyui", type=Path, help="checkout of Comfy-Org/ComfyUI")
    parser.add_argument("--place", type=Path, help="folder for the models, which are deleted in the end")
    options = parser.parse_args()
    family, wanted = options.family, [options.only] if options.only else list(_PARTS)
    with tempfile.TemporaryDirectory(dir=options.place) as place:
        model, file = Path(place) / "model", Path(place) / "model.safetensors"
        write_true_size(model, family)
        seconds, peak = measure(["lowvram-db", "export", str(model), "--out", str(file)], Path(place) / "export.log")
        if "export" in wanted:
            report(family, "export", "-", seconds, peak_gib=peak / 2**30)
        if "load" in wanted:
            for words, command in {"a folder": [str(model)], "the file": [str(file), str(model / "tokenizer")]}.items():
                seconds, process, peak_gib = loaded(command, Path(place))
                report(family, f"load all networks from {words}", "-", seconds, process, peak_gib)
        if "first-step" in wanted:
            keys = {
                "a folder": {"name": str(model)},
                "the file": {"name": str(file), "tokenizer": f"{model}/tokenizer"},
            }
            for words, cost in first_steps(keys, Path(place), _PAIRS).items():
                report(family, f"up to the first training step from {words}, median of {_PAIRS}", "-", *cost)
        checkouts = {"sd-scripts": options.sd_scripts, "comfyui": options.comfyui}
        programs = {"folder": None, "diffusers": None, **{name: one for name, one in checkouts.items() if one}}
        if "open" in wanted:
            for program, checkout in programs.items():
                compare(family, program, checkout, {"model": str(model), "file": str(file)})
        if "lora" in wanted:
            lora, merged = Path(place) / "lora.safetensors", Path(place) / "merged"
            write_random_lora(lora, model)
            merge(str(model), lora, 1.0, merged, torch.float32)
            compare(family, "folder", None, {"model": str(merged), "file": str(file), "stored": "float32"})
            for program in programs.keys() & {"diffusers", "comfyui"}:
                job = {"model": str(model), "file": str(file), "lora": str(lora)}
                compare(family, program, programs[program], job)


def loaded(words: list[str], place: Path) -> list[float]:
    """What a first loading costs up to the denoiser in bf16, the model's digest in it: seconds, those of the processor,
    and the peak of memory in GiB."""
    command = [sys.executable, str(Path(__file__).with_name("load_model.py")), *words]
    environment = {**os.environ, "XDG_CACHE_HOME": str(place / "home")}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return [float(word) for word in done.stdout.split()]


def write_random_lora(path: Path, model: Path) -> None:
    """One for UNet and text encoders of a model's folder, as a run of `targets = "all"` writes it."""
    blank, settings = open_blank(model), MethodConfig(name="lora", rank=8, targets="all")
    networks: dict[str, Any] = {"unet": blank.load_denoiser(), **blank.load_text_encoders()}
    for part, network in networks.items():
        adapt(network, part, settings, blank.trainable(part, network), seed=0)
    torch.manual_seed(0)
    lora = {
        layer: low._replace(up=0.02 * torch.randn(low.up.shape)) for layer, low in lora_of_networks(networks).items()
    }
    with open_stored(str(model)) as base:
        write_lora(path, base.family, lora, torch.float16, describe_lora(base, path.stem, torch.float16, "base", None))


def compare(family: str, program: str, checkout: Path | None, files: dict[str, str]) -> None:
    """One program's row: how far what its networks give is from what the folder's do ("folder" makes the reference).

    files: model (folder), file, lora if it takes one, and stored, the dtype of a folder that is not in float16.
    """
    place, dtype = Path(files["file"]).parent, _UNET_IN[family]
    out = place / f"{program}.pt"
    job = {"checkout": str(checkout or ""), "out": str(out), "family": family, "dtype": dtype, **files}
    python = python_of(checkout / "README.md") if checkout else sys.executable
    began = time.monotonic()
    done = subprocess.run(
        [python, str(_LOADER), program, json.dumps(job)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    seconds = time.monotonic() - began
    what = "open a LoRA in" if "lora" in files else "open in"
    what += f" {program}" + (f" {commit_of(checkout / 'README.md')}" if checkout else "") + f", UNet in {dtype}"
    if done.returncode:
        report(family, what, (done.stderr.strip().splitlines() or ["no word"])[-1][:120], seconds)
    elif program != "folder":
        outputs, reference = torch.load(out), torch.load(place / "folder.pt")
        said = ", ".join(f"{part} {furthest(outputs[part], reference[part]):.0e}" for part in reference)
        report(family, what, said, seconds)


def furthest(one: Tensor, other: Tensor) -> float:
    """The largest difference, in units of the largest number."""
    return ((one - other).abs().max() / other.abs().max()).item()


def report(
    family: str, what: str, difference: str, seconds: float, process: float | None = None, peak_gib: float | None = None
) -> None:
    row = {
        "what": what,
        "model": f"{_NAMES[family]} shape, random weights, fp16",
        "largest difference of outputs": difference,
        "seconds": f"{seconds:.1f}",
        "process_s": f"{process:.1f}" if process else "-",
        "peak_gib": f"{peak_gib:.2f}" if peak_gib else "-",
    }
    add_row("compat", row)
    print(", ".join(f"{key}: {value}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
