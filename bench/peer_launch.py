"""The launcher of bench/peers.py, in the peer's process: watch, then run its script as if it had been called.

It runs under the peer's own Python and wants nothing but torch there. It caps the allocator and takes time and peaks
after every step of a torch optimizer: that is what all trainers have in common. What comes after the last step, such
as saving, is not looked at.

    python bench/peer_launch.py '{"limit": null, "device": "cpu", "result": "result.json"}' SCRIPT WORDS...
"""

import atexit
import json
import runpy
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from usage import bytes_written, peaks, reset_peaks, settle, versions


def main(job: dict[str, Any], script: str, words: list[str]) -> None:
    device = torch.device(job["device"])
    if job["limit"] is not None and device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, job["limit"] / total), device.index)
    times: list[float] = []
    figures: dict[str, Any] = {}

    def after_step(*_: Any) -> None:
        settle(device)
        times.append(time.time())
        if len(times) == 1:
            reset_peaks(device)
        else:
            figures.update(_figures(times), **peaks(device), written_mib=bytes_written() / 2**20)

    register_optimizer_step_post_hook(after_step)
    atexit.register(lambda: Path(job["result"]).write_text(json.dumps({**figures, "made_with": versions()})))
    sys.argv = [script, *words]
    sys.path[0] = str(Path(script).parent)  # as if it had been called: its modules, not ours of the same name
    runpy.run_path(script, run_name="__main__")


def _figures(times: list[float]) -> dict[str, float]:
    """Seconds a step, from one step's end to the next's: median and quartiles; and when the first was done."""
    seconds = [after - before for before, after in pairwise(times)]
    low, middle, high = quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return {"first_done": times[0], "step_s": middle, "low_s": low, "high_s": high, "steps": len(seconds)}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2], sys.argv[3:])
