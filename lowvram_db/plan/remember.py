"""Plans that were made before, on disk, found by everything they depend on. Imports nothing heavy: a question asked
twice is answered at once."""

import hashlib
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lowvram_db.atomic import replacing_file
from lowvram_db.config import Config
from lowvram_db.files.user_cache import user_cache
from lowvram_db.memory import segments
from lowvram_db.plan.result import Plan

_LIBRARIES = ("torch", "diffusers", "transformers", "bitsandbytes")
# Settings that no tensor's size or life follows from: with another learning rate a plan is there at once.
_NO_MATTER: Any = {
    **dict.fromkeys(("subject", "cache", "checkpoint", "memory", "output"), True),
    "prior": {"weight", "count", "prompt", "prompts", "seed", "images", "steps"},
    "train": {"lr", "schedule", "warmup", "seed", "variants", "flip", "mask_weight", "hold_out", "validate_every"},
    "text_encoder": {"lr"},
    "optimizer": {"betas", "eps", "weight_decay"},
    "sample": {"prompts", "steps", "every"},  # but for whether there is any on the way
}
_PACKAGE = Path(__file__).parents[1]


def folder() -> Path:
    """Where plans are kept: the user's cache folder. Raises RuntimeError where no home is known."""
    return user_cache() / "plans"


def key(config: Config, configs: Path, budget: int | None, explain: bool) -> str:
    """A digest of the settings that matter (and which of them are the user's), the model's config files, our code, the
    versions of the libraries, how memory is taken, and the computer, whose arithmetic and card a plan tells of."""
    settings = [config.model_dump(mode="json", exclude=_NO_MATTER, exclude_unset=unset) for unset in (False, True)]
    that_matter = [{name: section for name, section in sections.items() if section} for sections in settings]
    digest = hashlib.sha256(json.dumps(that_matter).encode())
    versions = [version(library) for library in _LIBRARIES]
    samples = config.sample.every > 0
    digest.update(f"{budget} {explain} {samples} {segments.growing()} {versions} {_computer()}".encode())
    kernels = _PACKAGE.parent / "kernels" if (_PACKAGE.parent / "kernels").is_dir() else _PACKAGE / "kernels"
    code = [*_PACKAGE.rglob("*.py"), *kernels.glob("*.py")]
    for file in sorted([*configs.glob("*.json"), *configs.glob("*/*config.json"), *code]):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _computer() -> tuple[str, str | None]:
    return platform.node(), os.environ.get("CUDA_VISIBLE_DEVICES")  # which says by which card it goes


def recall(key: str) -> Plan | None:
    """The plan kept under this key; None where there is none or it cannot be read."""
    try:
        return Plan.from_json(json.loads((folder() / f"{key}.json").read_text(encoding="utf-8")))
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError):
        return None


def keep(key: str, plan: Plan) -> None:
    """A folder that cannot be written only means that the next plan takes as long."""
    try:
        path = folder() / f"{key}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(path) as temporary:
            temporary.write_text(json.dumps(plan.to_json()), encoding="utf-8")
    except Exception:
        return
