"""Does a full-size Stable Diffusion train here, with how much memory, how fast?

Builds a pipeline of SD 1.5's, SD 2.1's or SDXL's true shape with random weights (4.3, 2.6 or 6.9 GB on disk, once),
then times the ordinary command line on it, from class images to the saved model, as a separate process, and puts
what its plan says of tensors beside the memory that the process took.

    python bench/full_size.py --model sdxl --steps 2 --resolution 256 --optimizer adam8
    python bench/full_size.py --model sdxl --resolution 1024 --vram 8GiB    # on a GPU, as on a card with no more
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from machine import add_row, computed

from lowvram_db.config import load
from lowvram_db.demo.miniature import write_photos, write_pipeline
from lowvram_db.families.schedule import read_schedule
from lowvram_db.formats.known import known_config, known_configs
from lowvram_db.memory.device import pick_device

# As the rows call it, its hub id, and the dtype of its files: to write SDXL in float32 takes 14 GB of RAM.
_MODELS = {
    "sd15": ("SD 1.5", "stable-diffusion-v1-5/stable-diffusion-v1-5", torch.float32),
    "sd21": ("SD 2.1", "stabilityai/stable-diffusion-2-1", torch.bfloat16),
    "sdxl": ("SDXL", "stabilityai/stable-diffusion-xl-base-1.0", torch.bfloat16),
}
_SAMPLE_EVERY = 0.05  # seconds between two readings of the process's memory

_CONFIG = """
[model]
name = "{folder}/model"
[subject]
photos = "{folder}/photos"
identifier = "pkblz"
class = "ball"
[prior]
count = 1
steps = 1
[sample]
prompts = ["a photo of a {{identifier}} {{class}}"]
guidance = [7.0]
seeds = 1
steps = 1
[checkpoint]
every = 0
[output]
dir = "{folder}"
name = "run"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=_MODELS, default="sd15")
    parser.add_argument("--folder", type=Path, help="default: runs/MODEL-random")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--optimizer", default="adam8")
    parser.add_argument("--compute", default="bf16")
    parser.add_argument("--vram", help="a budget for the whole command; default: what a GPU has free")
    options = parser.parse_args()
    folder = options.folder or Path(f"runs/{options.model}-random")
    config = prepare(folder, options.model)
    name = f"run-{int(time.time())}"
    command = ["lowvram-db", "train", str(config)]
    for setting in (
        f"train.steps={options.steps}",
        f"train.resolution={options.resolution}",
        f"optimizer.name={options.optimizer}",
        f"precision.compute={options.compute}",
        f"output.name={name}",
    ):
        command += ["--set", setting]
    if options.vram:
        command += ["--vram", options.vram]
    said = folder / f"{name}.log"
    seconds, peak = measure(command, said)
    run, log = folder / name, said.read_text()
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    path = add_row(
        "full_size",
        {
            "model": f"{_MODELS[options.model][0]} shape, random weights",
            "steps": len(steps),
            "resolution": options.resolution,
            "batch": "1 + 1 prior",
            "optimizer": options.optimizer,
            "compute": computed(options.compute, pick_device()),
            "budget": options.vram or "",
            "weights": load(run / "config.toml").weights,
            "weights_million": log.split("training ")[1].split(" M ")[0],
            "planned_gib": f"{_planned(run) / 2**30:.2f}",
            "peak_training_gib": f"{steps[-1]['peak_bytes'] / 2**30:.2f}",
            "peak_command_gib": f"{peak / 2**30:.2f}",
            "median_step_s": f"{median(step['seconds'] for step in steps):.1f}",
            "command_s": f"{seconds:.0f}",
        },
    )
    print(path.read_text().splitlines()[-1])


def prepare(folder: Path, model: str = "sd15") -> Path:
    """Write model, photos and config where they are not there yet; returns the config's path."""
    if not (folder / "model" / "model_index.json").exists():
        _write_model(folder / "model", *_MODELS[model][1:])
        write_photos(folder / "photos", count=4, side=512)
    config = folder / "full_size.toml"
    config.write_text(_CONFIG.format(folder=folder.as_posix()))
    return config


def _write_model(folder: Path, name: str, dtype: torch.dtype) -> None:
    configs = known_configs(name)
    assert configs is not None
    texts = {
        argument: known_config(name, part)
        for argument, part in (("text", "text_encoder"), ("text_2", "text_encoder_2"))
        if (configs / part).is_dir()
    }
    for text in texts.values():
        text.pop("eos_token_id"), text.pop("bos_token_id")  # its tokenizer is a small one, with ids of its own
    networks: dict[str, Any] = {part: known_config(name, part) for part in ("unet", "vae")} | texts
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        write_pipeline(folder, **networks, prediction_type=read_schedule(configs).prediction_type)
    finally:
        torch.set_default_dtype(before)


def _planned(run: Path) -> int:
    """Bytes of tensors at the worst moment of a run's plan: without what only a GPU needs."""
    phases = json.loads((run / "plan.json").read_text())["phases"]
    kinds = "weights", "optimizer", "gradients", "activations"
    return max(sum(phase["components"][kind] for kind in kinds) for phase in phases)


def measure(command: list[str], said: Path) -> tuple[float, int]:
    """Run a command: seconds, and the peak of its resident memory in bytes. said: where its stderr goes, to be read
    while it runs."""
    began, peak = time.monotonic(), 0
    executable = Path(sys.executable).with_name(command[0])
    with said.open("w") as log, subprocess.Popen([executable, *command[1:]], stderr=log) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                peak = max(peak, watched.memory_info().rss)
            except psutil.Error:
                break
            time.sleep(_SAMPLE_EVERY)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}:\n{said.read_text()}")
    return time.monotonic() - began, peak


if __name__ == "__main__":
    main()
