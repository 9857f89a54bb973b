"""What this process uses: which versions, how much memory at its peak, how many bytes written.

Wants nothing but torch: peers run it too, by their own Python.
"""

import contextlib
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_OTHERS = "triton", "diffusers", "transformers", "accelerate", "bitsandbytes", "xformers"  # beside Python and torch


def versions() -> dict[str, str]:
    """python, torch, and in one line the GPU's driver and what else there is of _OTHERS."""
    found = []
    if torch.cuda.is_available() and shutil.which("nvidia-smi"):
        words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        lines = subprocess.run(words, capture_output=True, text=True).stdout.split()
        found += [f"driver {lines[0]}"] if lines else []
    for package in _OTHERS:
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return {"python": platform.python_version(), "torch": torch.__version__, "versions": ", ".join(found)}


def settle(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peaks(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here on


def peaks(device: torch.device) -> dict[str, float]:
    """GiB since reset_peaks: what the allocator gave out and held, and the whole of what the process has (of a GPU,
    context and libraries with it, if nobody else is on the card)."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        figures = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device), total - free
    else:
        status = Path("/proc/self/status").read_text() if sys.platform == "linux" else ""
        found = re.search(r"VmHWM:\s+(\d+)", status)
        figures = 0, 0, int(found[1]) * 1024 if found else 0
    return dict(zip(("allocated_gib", "reserved_gib", "process_gib"), (x / 2**30 for x in figures), strict=True))


def bytes_written() -> int:
    """To disks, by this process so far."""
    if sys.platform != "linux":
        return 0
    found = re.search(r"^write_bytes: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0
