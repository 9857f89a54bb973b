"""How PyTorch's allocator takes memory from the card: in segments that grow, wherever it can.

By default it takes segments of 20 MiB and more, and what does not fit into the rest of one stays unused: half a GiB of
the card beside SDXL's weights and their state. Segments that grow leave next to nothing. PyTorch has them on Linux;
under WSL 2 some of its versions fail in their first allocation with them (pytorch/pytorch issue 192330).
"""

import os
import platform
import sys

_NAMES = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"  # the second is the older one, still read
_GROWING = "expandable_segments:True"


def grow() -> None:
    """Ask for segments that grow: to be called before the card is first used. The user's own setting stays."""
    if _users_own() is None and growing():
        os.environ[_NAMES[0]] = _GROWING


def growing() -> bool:
    """Whether segments grow here, or will after grow()."""
    own = _users_own()
    if own is not None:
        return sys.platform == "linux" and _GROWING in own.replace(" ", "")
    return sys.platform == "linux" and "microsoft" not in platform.release().lower()


def _users_own() -> str | None:
    return next((os.environ[name] for name in _NAMES if os.environ.get(name)), None)
