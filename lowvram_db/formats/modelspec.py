"""What a single file says of itself: the metadata of ModelSpec 1.0.1 (github.com/Stability-AI/ModelSpec)."""

import base64
import io
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import NamedTuple

import torch
from PIL import Image

HASH = "modelspec.hash_sha256"
_ORIGINAL = "https://github.com/Stability-AI/generative-models"  # whose names of tensors the file has
_ARCHITECTURES = {
    ("sd1", "epsilon"): "stable-diffusion-v1",
    ("sd1", "v_prediction"): "stable-diffusion-v1",
    ("sd2", "epsilon"): "stable-diffusion-v2-512",
    ("sd2", "v_prediction"): "stable-diffusion-v2-768-v",
    ("sdxl", "epsilon"): "stable-diffusion-xl-v1-base",
    ("sdxl", "v_prediction"): "stable-diffusion-xl-v1-base",
}
_SPOKEN = {"epsilon": "epsilon", "v_prediction": "v"}
_KEPT = ("modelspec.author", "modelspec.license", "modelspec.tags")  # of what a model was made from
_TOLD = ("unet", "vae")  # parts whose dtypes it has keys for
_THUMBNAIL = 256  # pixels, the longer side


class Subject(NamedTuple):
    """What a model was taught."""

    prompt: str
    picture: Image.Image | None = None


def describe(
    family: str,
    prediction: str,
    resolution: int,
    title: str,
    dtypes: Mapping[str, torch.dtype],
    before: Mapping[str, str],
    subject: Subject | None = None,
) -> dict[str, str]:
    """The metadata of a file, but for its hash.

    dtypes: by part. before: the metadata of the file it was made from. All of that is kept where nothing was taught,
    else only whose it is.
    """
    said = {key: text for key, text in before.items() if subject is None or key in _KEPT}
    said.pop(HASH, None)
    said |= {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": _ARCHITECTURES[family, prediction],
        "modelspec.implementation": _ORIGINAL,
        "modelspec.title": said.get("modelspec.title", title),
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),
        "modelspec.prediction_type": _SPOKEN[prediction],
    }
    said |= {f"modelspec.{part}_dtype": str(dtypes[part]).removeprefix("torch.") for part in _TOLD if part in dtypes}
    if subject is not None:
        said["modelspec.trigger_phrase"] = subject.prompt
        said["modelspec.usage_hint"] = f"Write: {subject.prompt}"
        if subject.picture is not None:
            said["modelspec.thumbnail"] = _data_uri(subject.picture)
    return said


def _data_uri(picture: Image.Image) -> str:
    small, content = picture.convert("RGB"), io.BytesIO()
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    small.save(content, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()
