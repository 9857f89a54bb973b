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

import torch
from full_size import measure, prepare
from machine import add_row
from peers import commit_of, python_of
from torch import Tensor

_ROOT = Path(__file__).parents[1]
_LOADER = Path(__file__).with_name("compat_load.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sd-scripts", type=Path, help="checkout of kohya-ss/sd-scripts")
    options = parser.parse_args()
    model = prepare(_ROOT / "runs" / "sd15-random").parent / "model"
    with tempfile.TemporaryDirectory(dir=model.parent) as place:
        file = Path(place) / "model.safetensors"
        words = ["export", str(model), "--out", str(file), "--dtype", "fp16"]
        seconds, peak, _ = measure(["lowvram-db", *words])
        report("export to fp16", "-", seconds, peak / 2**30)
        folder = Path(place) / "folder"
        measure(["lowvram-db", *words[:2], "--format", "diffusers", "--out", str(folder), "--dtype", "fp16"])
        for name, words in {"a folder": [str(folder)], "the file": [str(file), str(model / "tokenizer")]}.items():
            for start in ("first", "second"):
                took, gib = loaded(words)
                report(f"load all networks from {name}, {start} start", "-", took, gib)
        for program, checkout in {"folder": None, "diffusers": None, "sd-scripts": options.sd_scripts}.items():
            if program in ("folder", "diffusers") or checkout:
                compare(program, checkout, model, file, Path(place))


def loaded(words: list[str]) -> tuple[float, float]:
    """What a start costs up to the denoiser in bf16, the model's digest in it: seconds, and the peak of memory, GiB."""
    script = Path(__file__).with_name("load_model.py")
    done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, check=True)
    seconds, peak = done.stdout.split()
    return float(seconds), float(peak)


def compare(program: str, checkout: Path | None, model: Path, file: Path, place: Path) -> None:
    """One program's row: how far what its networks give is from what the folder's do ("folder" makes the reference)."""
    out = place / f"{program}.pt"
    job = {"file": str(file), "model": str(model), "checkout": str(checkout or ""), "out": str(out)}
    python = python_of(checkout / "train_db.py") if checkout else sys.executable
    command = [python, str(_LOADER), program, json.dumps(job)]
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


def report(what: str, difference: str, seconds: float, peak: float, checkout: Path | None = None) -> None:
    row = {
        "what": what + (f" {commit_of(checkout / 'train_db.py')}" if checkout else ""),
        "model": "SD 1.5 shape, random weights, fp16",
        "largest difference of outputs": difference,
        "seconds": f"{seconds:.1f}",
        "peak_gib": f"{peak:.2f}" if peak else "-",
    }
    add_row("compat", row)
    print(", ".join(f"{key}: {value}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
