"""What a start costs up to the first training step, through the real command, of models that take turns: for
bench/compat.py."""

import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import psutil

from lowvram_db.demo.miniature import write_photos

_POLL = 0.02  # seconds
_CONFIG = """
[model]
{model}
[subject]
photos = "{photos}"
identifier = "pkblz"
class = "ball"
[prior]
enabled = false
[train]
resolution = 64
[output]
dir = "{out}"
"""


class Cost(NamedTuple):
    seconds: float  # until the first step is done, in all
    process: float  # of the processor


def first_steps(models: dict[str, dict[str, str]], place: Path, pairs: int) -> dict[str, Cost]:
    """The medians of a first start and of later ones, by "WORDS, first start" and "WORDS, again".

    models: what `[model]` has in each one's settings, by words for it. A first start has the making of the plan in it.
    """
    write_photos(place / "photos", count=2, side=64)
    costs: dict[str, list[Cost]] = {}
    for pair in range(pairs):
        for words, keys in models.items():
            folder = place / f"{words}-{pair}".replace(" ", "-")
            folder.mkdir()
            model = "\n".join(f'{key} = "{value}"' for key, value in keys.items())
            config = folder / "run.toml"
            config.write_text(_CONFIG.format(model=model, photos=place / "photos", out=folder))
            for start in ("first start", "again"):
                costs.setdefault(f"{words}, {start}", []).append(_first_step(config, folder, start.replace(" ", "-")))
    return {words: Cost(*map(median, zip(*each, strict=True))) for words, each in costs.items()}


def _first_step(config: Path, folder: Path, run: str) -> Cost:
    metrics, began = folder / run / "metrics.jsonl", time.monotonic()
    with (folder / f"{run}.log").open("w") as log:
        executable = str(Path(sys.executable).with_name("lowvram-db"))
        command = [executable, "train", str(config), "--set", f"output.name={run}"]
        environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(command, env=environment, stderr=log, stdout=log)
    watched = psutil.Process(process.pid)
    while not (metrics.exists() and metrics.stat().st_size):
        if process.poll() is not None:
            raise SystemExit((folder / f"{run}.log").read_text())
        time.sleep(_POLL)
    times = watched.cpu_times()
    cost = Cost(time.monotonic() - began, times.user + times.system)
    process.kill()
    process.wait()
    return cost
