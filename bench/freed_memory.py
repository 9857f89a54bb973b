"""What does it cost a CPU that freed memory goes back to the system? `python bench/freed_memory.py`

Our step (bench/recipes.py) of a full-size SD 1.5 or SDXL, no checkpointing, in a process with lowvram_db/memory/heap.py
and in one without, by turns; appends a row each to bench/results/freed_memory.csv: the median step, new pages and the
kernel's own time in it, and the process's peak. Linux only.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from statistics import median
from typing import Any

import torch
from adam8 import MODELS
from machine import add_row
from recipes import Ours, Work
from usage import peaks

from lowvram_db.memory.heap import keep_freed_memory
from lowvram_db.quiet import quiet_libraries
from lowvram_db.train.strategy import Strategy

KINDS = "given back", "kept"


def child(kind: str, model: str, resolution: int, steps: int) -> list[dict[str, float]]:
    """Seconds, new pages and the kernel's seconds of each step, after one that does not count."""
    quiet_libraries()
    if kind == "kept":
        keep_freed_memory()
    work = Work(MODELS[model], resolution)
    recipe = Ours(work, torch.device("cpu"), Strategy(0, work.family().checkpoint_steps))
    found = []
    for _ in range(steps + 1):
        before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        recipe.step()
        seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
        figures = {"step_s": seconds, "pages": after.ru_minflt - before.ru_minflt}
        found.append({**figures, "kernel_s": after.ru_stime - before.ru_stime})
    return [{**step, "process_gib": peaks(torch.device("cpu"))["process_gib"]} for step in found[1:]]


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(**json.loads(sys.argv[2]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="sd15")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--turns", type=int, default=2, help="processes of each kind")
    given = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for _ in range(given.turns):
        for kind in KINDS:
            job = {"kind": kind, "model": given.model, "resolution": given.resolution, "steps": given.steps}
            command = [sys.executable, __file__, "--child", json.dumps(job)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[kind] += json.loads(done.stdout.splitlines()[-1])
    for kind, steps in found.items():
        middle = {name: median(step[name] for step in steps) for name in steps[0]}
        row = {
            "model": given.model,
            "resolution": given.resolution,
            "freed": kind,
            "steps": len(steps),
            "threads": torch.get_num_threads(),
            "step_s": f"{middle['step_s']:.3f}",
            "pages": f"{middle['pages']:.0f}",
            "kernel_s": f"{middle['kernel_s']:.2f}",
            "process_gib": f"{middle['process_gib']:.2f}",
        }
        add_row("freed_memory", row)
        print("  ".join(map(str, row.values())), flush=True)


if __name__ == "__main__":
    main()
