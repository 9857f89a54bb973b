"""What a process does on a CPU with memory that is freed: it keeps it, for the next tensor of that size.

The C library of Linux (glibc) gives blocks above 32 MiB back to the system as soon as they are freed, and smaller ones
at the end of its heap; the next one is of new pages, each of which the kernel fills with zeros at the first touch:
667,000 of them in a training step of Stable Diffusion 1.5 at 256 px, an eighth of its time on two cores
(bench/freed_memory.py). The most that a process holds at any time is what it was.
"""

import ctypes
import os
import sys

_MMAP_MAX, _TRIM_THRESHOLD = -4, -1  # mallopt's numbers for them, in malloc.h
_NAMES = "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"


def keep_freed_memory() -> None:
    """Let this process do so from now on. What the user has set in the environment stays, and other C libraries do as
    they do."""
    if sys.platform != "linux" or any(os.environ.get(name) for name in _NAMES):
        return
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)
