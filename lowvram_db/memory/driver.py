"""The NVIDIA driver of this machine, and which builds of torch it can run.

torch from 2.11 on comes for CUDA 12.6 and 13.0 (RELEASE.md in its repository). Programs for CUDA 13 want driver 580,
those for CUDA 12 driver 525, on Windows 528 (NVIDIA's CUDA compatibility tables). The builds for CUDA 13 have nothing
for cards before Turing, those for CUDA 12.6 nothing for Blackwell.
"""

import shutil
import subprocess
import sys

import torch

from lowvram_db.memory.segments import under_wsl

_FOR_CUDA_13, _FOR_CUDA_12, _FOR_CUDA_12_ON_WINDOWS = 580, 525, 528
_TURING, _BLACKWELL = 7.5, 10.0  # compute capability


def version() -> str:
    """As nvidia-smi says it, such as "580.95.05"; empty where there is no driver."""
    return _ask("driver_version")


def mend() -> str:
    """The command, or the driver to get, after which torch has a card on this machine."""
    driver = version()
    if not driver:
        return "install NVIDIA's driver, 580 or newer"
    release, capability = int(driver.partition(".")[0]), float(_ask("compute_cap") or _TURING)
    on_windows = sys.platform == "win32" or under_wsl()  # which has Windows' driver
    if release >= _FOR_CUDA_13 and capability >= _TURING:
        return _install("cu130")
    if release >= (_FOR_CUDA_12_ON_WINDOWS if on_windows else _FOR_CUDA_12) and capability < _BLACKWELL:
        return _install("cu126")
    return f"update the GPU's driver to 580 or newer (it is {driver})"


def _install(build: str) -> str:
    """With the build in the version, or pip would be content with the one that is there."""
    release = torch.__version__.partition("+")[0]
    return f"pip install torch=={release}+{build} --index-url https://download.pytorch.org/whl/{build}"


def _ask(field: str) -> str:
    """What nvidia-smi says of the first card; empty where it cannot."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    command = [program, f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    first = done.stdout.strip().partition("\n")[0]
    return first if done.returncode == 0 and first[:1].isdigit() else ""
