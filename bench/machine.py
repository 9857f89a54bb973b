"""Where and with what a figure was measured: the columns that every row of bench/results begins with."""

import csv
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch
from usage import versions

from lowvram_db.memory.device import emulation

RESULTS = Path(__file__).parent / "results"
_ROOT = Path(__file__).parents[1]


def stamp() -> dict[str, str]:
    """Date (UTC), commit (with + where the tree had changes other than rows like this one), machine and versions."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "commit": os.environ.get("COMMIT") or _commit(),  # said by whoever copied the tree without its history
        "machine": machine(),
        **versions(),
    }


def machine() -> str:
    """The GPU's name, or the processor's with its core count."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] \
        if cpuinfo.exists() else []  # fmt: skip
    held = f", oneDNN held to {isa}" if (isa := os.environ.get("ONEDNN_MAX_CPU_ISA")) else ""
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, no GPU{held}"


def computed(compute: str, device: torch.device) -> str:
    """The arithmetic of a step: what was asked for, or what stands in where the CPU would only emulate that."""
    return f"fp32 for {compute}" if emulation(compute, device) else compute


def add_row(name: str, row: Mapping[str, object]) -> Path:
    """Append a row, stamped, to bench/results/NAME.csv; the columns of an existing file must be the same. A row that
    tells of other versions than this process has is believed."""
    path = RESULTS / f"{name}.csv"
    stamped = {**stamp(), **row}
    exists = path.exists()
    if exists:
        with path.open(newline="") as file:
            header = next(csv.reader(file))
        if header != list(stamped):
            raise SystemExit(f"{path}: has other columns; move it away first")
    path.parent.mkdir(exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(stamped))
        if not exists:
            writer.writeheader()
        writer.writerow(stamped)
    return path


def _commit() -> str:
    changed = _git("status", "--porcelain", "-uno", "--", ".", ":!bench/results")
    return _git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=_ROOT, capture_output=True, text=True).stdout.strip()
