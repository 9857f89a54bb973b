"""Does an exported file open elsewhere, and what do writing and opening it cost?

    python bench/compat.py
    python bench/compat.py --family sdxl --sd-scripts .../sd-scripts --comfyui .../ComfyUI
    python bench/compat.py --only first-step

A model of its family's true sizes with random weights in fp16 is exported, and each program's own loader opens the
file; UNet, text encoders and VAE are called on the same inputs, and compared with the folder that the file was made of.
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

import torch
from first_step import first_steps
from full_size import measure
from machine import add_row
from peers import commit_of, python_of
from torch import Tensor
from true_size import write_true_size

_LOADER = Path(__file__).with_name("compat_load.py")
_NAMES = {"sd1": "SD 1.5", "sd2": "SD 2.1", "sdxl": "SDXL"}
_UNET_IN = {"sd1": "float32", "sd2": "float32", "sdxl": "bfloat16"}  # so that no network takes 10 GB
_PAIRS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=[*_NAMES], default="sd1")
    parser.add_argument("--only", choices=["export", "load", "first-step", "open"])
    parser.add_argument("--sd-scripts", type=Path, help="checkout of kohya-ss/sd-scripts")
    parser.add_argument("--comfyui", type=Path, help="checkout of Comfy-Org/ComfyUI")
    parser.add_argument("--place", type=Path, help="folder for the models, which are deleted in the end")
    options = parser.parse_args()
    family, wanted = options.family, [options.only] if options.only else ["export", "load", "first-step", "open"]
    with tempfile.TemporaryDirectory(dir=options.place) as place:
        model, file = Path(place) / "model", Path(place) / "model.safetensors"
        write_true_size(model, family)
        seconds, peak, _ = measure(["lowvram-db", "export", str(model), "--out", str(file)])
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
        if "open" in wanted:
            checkouts = {"sd-scripts": options.sd_scripts, "comfyui": options.comfyui}
            for program, checkout in {"folder": None, "diffusers": None, **checkouts}.items():
                if program not in checkouts or checkout:
                    compare(family, program, checkout, model, file)


def loaded(words: list[str], place: Path) -> list[float]:
    """What a first loading costs up to the denoiser in bf16, the model's digest in it: seconds, those of the processor,
    and the peak of memory in GiB."""
    command = [sys.executable, str(Path(__file__).with_name("load_model.py")), *words]
    environment = {**os.environ, "XDG_CACHE_HOME": str(place / "home")}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return [float(word) for word in done.stdout.split()]


def compare(family: str, program: str, checkout: Path | None, model: Path, file: Path) -> None:
    """One program's row: how far what its networks give is from what the folder's do ("folder" makes the reference)."""
    out, dtype = file.with_name(f"{program}.pt"), _UNET_IN[family]
    job = {"file": str(file), "model": str(model), "checkout": str(checkout or ""), "out": str(out)}
    python = python_of(checkout / "README.md") if checkout else sys.executable
    command = [python, str(_LOADER), program, json.dumps(job | {"family": family, "dtype": dtype})]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    seconds = time.monotonic() - began
    what = f"open in {program}" + (f" {commit_of(checkout / 'README.md')}" if checkout else "") + f", UNet in {dtype}"
    if done.returncode:
        report(family, what, (done.stderr.strip().splitlines() or ["no word"])[-1][:120], seconds)
    elif program != "folder":
        outputs, reference = torch.load(out), torch.load(file.with_name("folder.pt"))
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
