"""Where the user's caches are."""

import os
from pathlib import Path


def user_cache() -> Path:
    """The folder of ours. Raises RuntimeError where no home is known."""
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or Path.home() / ".cache"
    return Path(base) / "lowvram-db"
