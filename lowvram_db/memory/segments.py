"""How PyTorch's allocator takes memory from the card: in segments that grow, wherever it can.

By default it takes segments of 20 MiB and more, and what does not fit into the rest of one stays unused: half a GiB of
the card beside SDXL's weights and their state (torch 2.11's allocator over a stand-in for the driver; not seen on a
card). Segments that grow leave next to nothing. PyTorch has them on Linux; under WSL 2 some of its versions fail in
their first allocation with them (pytorch/pytorch issue 192330).
"""

import os
import platform
import sys

_NAMES = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"  # the second is the older one, still read
GROWING = "expandable_segments:True"


def grow() -> None:
    """Ask for segments that grow. The user's own setting stays.

    In time before torch or bitsandbytes is imported, which may read the environment there and then; memory/device.py
    tells torch again.
    """
    if _users_own() is None and growing():
        os.environ[_NAMES[0]] = GROWING


def growing() -> bool:
    """Whether segments grow here, or will after grow()."""
    own = _users_own()
    if own is not None:
        return sys.platform == "linux" and GROWING in own.replace(" ", "")
    return sys.platform == "linux" and not under_wsl()


def under_wsl() -> bool:
    return sys.platform == "linux" and "microsoft" in platform.release().lower()


def asked() -> bool:
    """Whether the environment asks for segments that grow, and for nothing else."""
    return os.environ.get(_NAMES[0]) == GROWING


def _users_own() -> str | None:
    return next((os.environ[name] for name in _NAMES if os.environ.get(name)), None)
