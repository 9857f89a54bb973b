"""What does it cost that convolutions and their weights lie in different orders? `python bench/layout.py`

Our step (bench/recipes.py) with the weights contiguous and channels last, in turn, on one device; appends a row each to
bench/results/layout.csv: the median step, on a GPU also cuDNN's conversions a step and the time that they take.
"""

import argparse
import re
import time
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from adam8 import MODELS
from machine import add_row
from recipes import Ours, Work, everywhere
from torch.profiler import ProfilerActivity, profile
from usage import settle

from lowvram_db.memory.device import pick_device
from lowvram_db.quiet import quiet_libraries
from lowvram_db.train import learner

LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
_CONVERSION = re.compile("nchwToNhwc|nhwcToNchw")


def laid_out(work: Work, device: torch.device, layout: str, **sections: Any) -> Ours:
    def lay_out(network: torch.nn.Module, _: torch.device) -> None:
        network.to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]  # which torch's stubs lack

    with patch.object(learner, "lay_out", lay_out):
        return Ours(work, device, everywhere(work.family()), **sections)


def seconds(recipe: Ours, device: torch.device) -> float:
    settle(device)
    began = time.perf_counter()
    recipe.step()
    settle(device)
    return time.perf_counter() - began


def conversions(recipe: Ours, device: torch.device) -> tuple[int, float]:
    """How many, and their milliseconds, in one step on a GPU."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        seconds(recipe, device)
    found = [event for event in profiler.events() if _CONVERSION.search(event.name)]
    return len(found), sum(event.self_device_time_total for event in found) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="sd15")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--compute", choices=["bf16", "fp16", "fp32"], default="bf16")
    parser.add_argument("--steps", type=int, default=10)
    given = parser.parse_args()
    quiet_libraries()
    device = pick_device()
    work = Work(MODELS[given.model], given.resolution, compute=given.compute)
    recipes = {name: laid_out(work, device, name) for name in LAYOUTS}
    times: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    for step in range(given.steps + 1):
        for name, recipe in recipes.items():
            taken = seconds(recipe, device)
            if step:  # the first one compiles
                times[name].append(taken)
    for name, recipe in recipes.items():
        count, spent = conversions(recipe, device) if device.type == "cuda" else ("", "")
        row = {
            "model": given.model,
            "resolution": given.resolution,
            "compute": given.compute,
            "layout": name,
            "steps": given.steps,
            "step_s": f"{median(times[name]):.4f}",
            "conversions": count,
            "conversions_ms": spent if spent == "" else f"{spent:.2f}",
            "threads": torch.get_num_threads(),
        }
        add_row("layout", row)
        print("  ".join(map(str, row.values())), flush=True)


if __name__ == "__main__":
    main()
