"""Windows lets a full card spill into system memory: no error, only everything slow. Its own counters tell.

Under WSL 2 they know no process of Linux, but what all programs together have there; Windows' PowerShell can be called
from there unless its user has turned that off. Written from Microsoft's description of the counters; not yet tried on a
Windows machine with a GPU.
"""

import os
import subprocess
import sys
import threading
from types import TracebackType

import torch

from lowvram_db.memory.segments import under_wsl
from lowvram_db.memory.size import gib
from lowvram_db.progress import say

_HARMLESS = 256 * 2**20  # a CUDA process takes pinned memory there in any case
_EVERY = 60.0  # seconds
_COUNTERS = "Win32_PerfFormattedData_GPUPerformanceCounters_"
_OF_A_PROCESS = "GPUProcessMemory | Where-Object Name -like 'pid_{}_*'"
_OF_ALL = "GPUAdapterMemory"
_MEND = (
    "close other programs that use the GPU, or give a smaller --vram; in the NVIDIA control panel, "
    '"CUDA - Sysmem Fallback Policy: Prefer No Sysmem Fallback" turns that into an error'
)


def shared_bytes() -> int | None:
    """System memory that is in use as GPU memory, by this process, under WSL 2 by all; None where nobody knows."""
    if sys.platform == "win32":
        shell, whose = "powershell", _OF_A_PROCESS.format(os.getpid())
    elif under_wsl():
        shell, whose = "powershell.exe", _OF_ALL
    else:
        return None
    question = f"(Get-CimInstance {_COUNTERS}{whose} | Measure-Object SharedUsage -Sum).Sum"
    try:
        command = [shell, "-NoProfile", "-Command", question]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
        return int(float(answer.replace(",", ".")))
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


class Watch:
    """Looks every minute, beside the work, whether the card spills, and says so once. A context manager."""

    def __init__(self, device: torch.device, every: float = _EVERY) -> None:
        self._device, self._every = device, every
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watch":
        if self._device.type == "cuda" and (before := shared_bytes()) is not None:
            self._thread = threading.Thread(target=self._look, args=(before,), daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()  # and nobody waits for an answer that is still to come

    def _look(self, before: int) -> None:
        while not self._ended.wait(self._every):
            spilled = (shared_bytes() or before) - before
            if spilled > _HARMLESS:
                say(
                    f"{gib(spilled)} of the GPU's memory have spilled into system memory since this began, which is "
                    f"10 to 100 times slower: {_MEND}"
                )
                return
