"""What does more of it cost? Seconds and memory as batch, resolution and number of photos grow.

    python bench/growth.py batch --values 1,2,4,8,16
    python bench/growth.py resolution --values 256,384,512,768,1024
    python bench/growth.py photos --values 5,50,500,5000

A training step is set beside its floor: the arithmetic it has to do (counted in a trace, without what checkpointing
repeats) at the rate of a large matrix product measured here, and the bytes the optimizer has to move at the rate of a
copy measured here. Photos are set beside nothing: their number should not matter. Rows go to bench/results/growth.csv.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from adam8 import MODELS, copy_speed, timed
from cache_damage import build, write_noise
from machine import add_row
from recipes import Ours, Work, everywhere, measured
from usage import peaks, reset_peaks

from lowvram_db.concept import Concept
from lowvram_db.demo.miniature import write_pipeline
from lowvram_db.families import open_model
from lowvram_db.memory.device import pick_device
from lowvram_db.plan import predict
from lowvram_db.quiet import hide_loading_bars
from lowvram_db.train.batches import Batches
from lowvram_db.train.strategy import Strategy

_ADAM8_BYTES = 10.03  # moved a weight and step, as bench/adam8.py counts them


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        work, steps = json.loads(sys.argv[2])
        print(json.dumps(_step(Work(**work), steps)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["batch", "resolution", "photos"])
    parser.add_argument("--values", required=True, help="with commas between")
    parser.add_argument("--model", default="sd15", help="sd15, sdxl, or a folder")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5, help="that count, after one that does not")
    given = parser.parse_args()
    values = [int(value) for value in given.values.split(",")]
    if given.what == "photos":
        for count in values:
            _report("photos", count, "miniature, 64 px", photos(count))
        return
    rates = matmul_rate(), copy_speed(pick_device())
    for value in values:
        size = {"batch": value, "resolution": given.resolution} if given.what == "batch" else {"resolution": value}
        work = Work(MODELS.get(given.model, given.model), **size)
        _report(given.what, value, f"{given.model}, {work.resolution} px, {work.batch} + {work.batch}",
                step(work, given.steps, *rates))  # fmt: skip


def step(work: Work, steps: int, matmul: float, copy: float) -> dict[str, float | str]:
    """A training step, in a process of its own, beside its floor."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps([asdict(work), steps])], capture_output=True, text=True
    )
    if done.returncode:
        return {"outcome": "out of memory" if "OutOfMemory" in done.stderr else done.stderr.strip().splitlines()[-1]}
    figures: dict[str, float | str] = json.loads(done.stdout.splitlines()[-1])
    seconds = float(figures["step_s"])
    floor = float(figures.pop("operations")) / matmul + float(figures.pop("moved_gb")) / copy
    return {"outcome": "ok", **figures, "floor_s": floor, "times_floor": seconds / floor}


def _step(work: Work, steps: int) -> dict[str, float]:
    """Checkpointing everywhere, as where memory is short."""
    hide_loading_bars()
    family = work.family()
    bare = predict.training(work.config(), family, Strategy(0, family.checkpoint_steps))[0].flops
    device = pick_device()
    recipe = Ours(work, device, everywhere(family))
    weights = sum(parameter.numel() for parameter in recipe.learner.parameters)
    figures = measured(recipe, steps, device)
    figures.pop("first_done")
    return {**figures, "operations": float(bare), "moved_gb": _ADAM8_BYTES * weights / 1e9}


def matmul_rate() -> float:
    """Operations a second in a product of two large bf16 matrices."""
    device = pick_device()
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / timed(lambda: a @ b, device, 5)


def photos(count: int) -> dict[str, float | str]:
    """A run's data from `count` photos, in the miniature: encoded once, found again, and read batch by batch."""
    hide_loading_bars()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_pipeline(place / "model")
        family, files = open_model(str(place / "model")), write_noise(place / "photos", count, (96, 96))
        began = time.perf_counter()
        build(family, place / "cache", files, 64)
        first = time.perf_counter() - began
        began = time.perf_counter()
        cached = build(family, place / "cache", files, 64)
        again = time.perf_counter() - began
        reset_peaks(torch.device("cpu"))
        before = peaks(torch.device("cpu"))["process_gib"]
        batches = Batches(Concept(files, ["a ball"], [], ""), cached, 1, seed=0)
        seconds = timed(lambda: [batches[number] for number in range(count, count + 100)], torch.device("cpu"), 3) / 100
        grown = peaks(torch.device("cpu"))["process_gib"] - before
        return {"outcome": "ok", "encode_s": first, "start_s": again, "step_s": seconds, "process_gib": grown}


_COLUMNS = ("step_s", "low_s", "high_s", "allocated_gib", "reserved_gib", "process_gib", "floor_s", "times_floor")


def _report(what: str, value: int, work: str, figures: dict[str, Any]) -> None:
    row: dict[str, object] = {"what": what, "value": value, "work": work, "outcome": figures["outcome"]}
    for column in (*_COLUMNS, "encode_s", "start_s"):
        row[column] = f"{figures[column]:.5g}" if column in figures else ""
    add_row("growth", row)
    print("  ".join(str(x) for x in row.values() if x != ""), flush=True)


if __name__ == "__main__":
    main()
