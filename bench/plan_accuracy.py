"""Is a plan right, and how long does it take? `python bench/plan_accuracy.py`

Without a GPU: the predicted peak of a training step beside torch's MemTracker on five configurations of Stable
Diffusion 1.5, and the time of `lowvram-db plan`, the first time and again. On a GPU: beside
torch.cuda.max_memory_allocated on ten configurations, which is what the constants of memory/overheads.py have to answer
for. Rows go to bench/results/plan_accuracy.csv and plan_time.csv. `--only again` needs no GPU: it predicts as for the
card of the rows that are there, which is how a change of those constants is looked at.
"""

import argparse
import csv
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from machine import RESULTS, add_row
from recipes import Ours, Work

from lowvram_db.memory import overheads, trace
from lowvram_db.memory.device import pick_device, release_memory
from lowvram_db.memory.overheads import CONTEXT, CUBLAS_WORKSPACES
from lowvram_db.plan import predict
from lowvram_db.plan import tracing as as_on_a_gpu
from lowvram_db.plan.reference import tracked_bytes
from lowvram_db.train.strategy import Strategy

SD1, SDXL = "stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-xl-base-1.0"
GPU_ONLY = [  # model, resolution, batch, prior, optimizer, weights, blocks with checkpointing
    (SD1, 512, 4, True, "adam8", "bf16", 9),
    (SD1, 768, 1, True, "adam8", "bf16", 9),
    (SDXL, 1024, 1, False, "adam8", "bf16", 7),
    (SDXL, 1024, 1, True, "adam8", "bf16", 7),
    (SDXL, 1024, 1, True, "adam8", "bf16+residual", 7),
]
EVERYWHERE = [
    (SD1, 512, 1, True, "adam8", "bf16", 9),
    (SD1, 512, 1, True, "adam8", "bf16", 0),
    (SD1, 512, 1, False, "adam8", "bf16+residual", 4),
    (SD1, 512, 2, False, "adamw", "fp32", 9),
    (SD1, 512, 1, True, "bnb-adam8", "fp32", 9),
]
_WORK = ("model", "resolution", "batch", "optimizer", "weights", "strategy")
PRESETS = ("sd15-4gb", "sd15-8gb", "sd15-12gb", "sd15-t4", "sd21-12gb", "sdxl-6gb", "sdxl-8gb", "sdxl-12gb",
           "sdxl-16gb", "sdxl-vpred")  # fmt: skip
_ROOT = Path(__file__).parents[1]


def compare(model: str, resolution: int, batch: int, prior: bool, optimizer: str, weights: str, blocks: int) -> None:
    work = Work(model, resolution, batch, prior)
    sections: dict[str, Any] = {"optimizer": {"name": optimizer}, "precision": {"weights": weights}}
    config, family = work.config(**sections), work.family()
    strategy = Strategy(blocks, family.checkpoint_steps)
    device = pick_device()
    if device.type == "cuda":
        witness = "max_memory_allocated"
        predicted = max(phase.allocated_bytes for phase in predict.training(config, family, strategy)[:2])
        recipe = Ours(work, device, strategy, **sections)
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            recipe.step()
        measured = torch.cuda.max_memory_allocated(device)
        del recipe
        release_memory()
    else:  # MemTracker neither rounds on a CPU nor knows what is inside an operation
        witness = "MemTracker"
        with patch.object(trace, "GRANULE", 1), patch.object(as_on_a_gpu, "temporaries", lambda *_, **__: 0):
            predicted = max(phase.peak_bytes for phase in predict.training(config, family, strategy)[:2])
        predicted -= CONTEXT + CUBLAS_WORKSPACES
        measured = tracked_bytes(config, family, strategy)
    own = (model.rpartition("/")[2], str(resolution), _batch(batch, prior), optimizer, weights, str(strategy))
    _report(witness, own, predicted, measured)


def _batch(batch: int, prior: bool) -> str:
    return f"{batch} + {batch} prior" if prior else str(batch)


def _report(witness: str, work: tuple[str, ...], predicted: float, measured: float) -> None:
    row = {
        "witness": witness,
        **dict(zip(_WORK, work, strict=True)),
        "predicted_gib": f"{predicted / 2**30:.3f}",
        "measured_gib": f"{measured / 2**30:.3f}",
        "error_percent": f"{100 * (predicted / measured - 1):+.2f}",
    }
    add_row("plan_accuracy", row)
    print("  ".join(map(str, row.values())), flush=True)


_CARDS = {"NVIDIA H200": (132, 2048)}  # multiprocessors, and threads at home on each


def predict_again() -> None:
    """The newest measured row of each of the GPU's configurations, beside what is predicted now."""
    with (RESULTS / "plan_accuracy.csv").open(newline="") as file:
        measured = [row for row in csv.DictReader(file) if row["machine"] in _CARDS]
    for model, resolution, batch, prior, optimizer, weights, blocks in EVERYWHERE + GPU_ONLY:
        work = Work(model, resolution, batch, prior)
        config = work.config(optimizer={"name": optimizer}, precision={"weights": weights})
        family = work.family()
        strategy = Strategy(blocks, family.checkpoint_steps)
        own = (model.rpartition("/")[2], str(resolution), _batch(batch, prior), optimizer, weights, str(strategy))
        for row in [row for row in measured if tuple(row[key] for key in _WORK) == own][-1:]:
            with patch.object(overheads, "_card", lambda card=row["machine"]: _CARDS[card]):
                predicted = max(phase.allocated_bytes for phase in predict.training(config, family, strategy)[:2])
            witness = f"{row['machine']}'s of commit {row['commit']}"
            _report(witness, own, predicted, float(row["measured_gib"]) * 2**30)


def time_plan(preset: str) -> None:
    """The whole command, with an empty memory of plans and again."""
    command = [str(Path(sys.executable).with_name("lowvram-db")), "plan", str(_ROOT / "configs" / f"{preset}.toml")]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "XDG_CACHE_HOME": folder}
        seconds, processor = [], []
        for _ in range(2):
            began, before = time.monotonic(), os.times().children_user + os.times().children_system
            said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
            seconds.append(time.monotonic() - began)
            processor.append(os.times().children_user + os.times().children_system - before)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # of the largest so far
    row = {
        "preset": preset,
        "said": next(line for line in said.splitlines() if line.startswith("peak ")).replace(",", ";"),
        "first_s": f"{seconds[0]:.1f}",
        "first_cpu_s": f"{processor[0]:.1f}",
        "again_s": f"{seconds[1]:.2f}",
        "again_cpu_s": f"{processor[1]:.2f}",
        "rss_gib": f"{peak:.2f}",
        "load": f"{os.getloadavg()[0]:.1f}",
    }
    add_row("plan_time", row)
    print("  ".join(row.values()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["accuracy", "time", "again"], help="default: the first two")
    only = parser.parse_args().only
    if only == "again":
        predict_again()
        return
    if only != "accuracy":
        for preset in PRESETS:
            time_plan(preset)
    if only != "time":
        for case in EVERYWHERE + (GPU_ONLY if torch.cuda.is_available() else []):
            compare(*case)


if __name__ == "__main__":
    main()
