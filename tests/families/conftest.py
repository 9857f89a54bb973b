import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

_WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


@pytest.fixture
def copy(miniature: Path, tmp_path: Path) -> Path:
    """The miniature, to be changed."""
    return shutil.copytree(miniature, tmp_path / "model")


@pytest.fixture
def edit(copy: Path) -> Callable[..., Path]:
    """Fields of one of the copy's JSON files are given other values."""

    def edit(file: str, **changes: Any) -> Path:
        path = copy / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return path

    return edit


@pytest.fixture
def rewrite(copy: Path) -> Callable[..., Path]:
    """The tensors of one of the copy's parts are replaced by what a function makes of them all."""

    def rewrite(part: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
        path = copy / part / _WEIGHTS[part]
        save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path)
        return path

    return rewrite
