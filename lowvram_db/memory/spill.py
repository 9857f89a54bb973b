"""Windows lets a full card spill into system memory: no error, only everything slow. Its own counters tell.

Written from Microsoft's description of the counters; not yet tried on a Windows machine with a GPU.
"""

import subprocess
import sys

_HARMLESS = 256 * 2**20  # a CUDA process keeps pinned memory there in any case
_QUESTION = (
    "(Get-CimInstance Win32_PerfFormattedData_GPUPerformanceCounters_GPUProcessMemory "
    "| Where-Object Name -like 'pid_{}_*' | Measure-Object SharedUsage -Sum).Sum"
)


def spilled_bytes(pid: int) -> int:
    """System memory a process uses as GPU memory, beyond what is harmless; 0 where it cannot spill or nobody knows."""
    if sys.platform != "win32":
        return 0
    try:
        command = ["powershell", "-NoProfile", "-Command", _QUESTION.format(pid)]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
        shared = int(float(answer.replace(",", ".")))
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return 0
    return shared if shared > _HARMLESS else 0
