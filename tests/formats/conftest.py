import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lowvram_db.families.weights import read_weights
from lowvram_db.formats import known
from lowvram_db.formats.forms import to_file
from lowvram_db.formats.layout import LAYOUTS
from lowvram_db.formats.tokenizer import Vocabulary, byte_letters, write_tokenizer
from lowvram_db.reading import STAND_IN

Shapes = dict[str, tuple[int, ...]]
_UNETS: dict[str, dict[str, Any]] = {
    "sd1": {
        "cross_attention_dim": 64,
        "block_out_channels": [64, 128],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    },
    "sd2": {
        "cross_attention_dim": 64,
        "block_out_channels": [64, 128],
        "attention_head_dim": [1, 2],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    },
    "sdxl": {
        "cross_attention_dim": 192,
        "block_out_channels": [64, 128],
        "attention_head_dim": [1, 2],
        "transformer_layers_per_block": [1, 2],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "projection_class_embeddings_input_dim": 128 + 6 * 256,
    },
}
_VAE = {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1}
_TEXTS: dict[str, dict[str, Any]] = {
    "text_encoder": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "projection_dim": 64,
    },
    "text_encoder_2": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "projection_dim": 128,
    },
}


def _read(kind: str, part: str) -> dict[str, Any]:
    return json.loads((Path(known.__file__).parent / kind / part / "config.json").read_text())


def _networks(
    kind: str, small: bool = True, unet: dict[str, Any] | None = None, device: str | None = None
) -> dict[str, nn.Module]:
    """A family's networks by the names of their folders: in miniature with random weights, else of their true size
    without any. unet: what its config has other than that."""
    vocabulary = {"vocab_size": 514} if small else {}
    with torch.device(device or ("cpu" if small else "meta")):
        unet = _read(kind, "unet") | ({"layers_per_block": 1, **_UNETS[kind]} if small else {}) | (unet or {})
        parts: dict[str, nn.Module] = {
            "unet": UNet2DConditionModel.from_config(unet),
            "vae": AutoencoderKL.from_config(_read(kind, "vae") | (_VAE if small else {})),
        }
        for part in ("text_encoder", "text_encoder_2")[: 1 + (kind == "sdxl")]:
            config = CLIPTextConfig(**_read(kind, part) | (_TEXTS[part] if small else {}) | vocabulary)
            parts[part] = (CLIPTextModelWithProjection if part.endswith("2") else CLIPTextModel)(config)
    return parts


@pytest.fixture(scope="session")
def networks() -> Callable[..., dict[str, nn.Module]]:
    return _networks


def _listed(kind: str) -> tuple[Shapes, Shapes]:
    """What tests/formats/keys says of a family: the tensors that diffusers holds, and the others of the original."""
    held: Shapes = {}
    others: Shapes = {}
    for line in (Path(__file__).parent / "keys" / f"{kind}.txt").read_text().splitlines():
        if not line.startswith("#"):
            shape, pattern = line.removeprefix("+ ").split()
            sizes = () if shape == "-" else tuple(map(int, shape.split("x")))
            (others if line.startswith("+") else held).update(dict.fromkeys(_expanded(pattern), sizes))
    return held, others


def _expanded(pattern: str) -> list[str]:
    choices = []
    for piece in re.split(r"(\{[^}]*\})", pattern):
        options: list[str] = []
        for option in piece.strip("{}").split(",") if piece.startswith("{") else [piece]:
            numbers = re.fullmatch(r"(\d+)-(\d+)", option)
            options += map(str, range(int(numbers[1]), int(numbers[2]) + 1)) if numbers else [option]
        choices.append(options)
    return ["".join(chosen) for chosen in itertools.product(*choices)]


@pytest.fixture(scope="session")
def listed() -> Callable[[str], tuple[Shapes, Shapes]]:
    return _listed


@pytest.fixture(scope="session")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tokenizer for the miniatures: every byte is a token; read only."""
    folder = tmp_path_factory.mktemp("letters") / "tokenizer"
    letters = list(byte_letters().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    write_tokenizer(folder, Vocabulary({token: n for n, token in enumerate(tokens)}, []), "<|endoftext|>", 77)
    return folder


def _file_of(kind: str, parts: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    """A single file of a family, key by key."""
    file: dict[str, torch.Tensor] = {}
    for part, (prefix, names) in LAYOUTS[kind].items():
        state, forms = parts[part].state_dict(), {}
        for name, (key, form) in names.places(state).items():
            forms.setdefault(prefix + key, {})[form] = state[name]
        file |= {key: to_file(tensors).contiguous() for key, tensors in forms.items()}
    return file


@pytest.fixture(scope="session")
def file_of() -> Callable[[str, dict[str, nn.Module]], dict[str, torch.Tensor]]:
    return _file_of


@pytest.fixture
def write_file(tmp_path: Path) -> Callable[..., Path]:
    """A miniature of a family in one file: its tensors as `change` leaves them."""

    def write(
        kind: str = "sd1",
        name: str = "model.safetensors",
        dtype: torch.dtype = torch.float16,
        change: Callable[[dict[str, torch.Tensor]], Any] = lambda tensors: None,
        metadata: dict[str, str] | None = None,
        seed: int = 0,
    ) -> Path:
        torch.manual_seed(seed)
        tensors = {key: tensor.to(dtype) for key, tensor in _file_of(kind, _networks(kind)).items()}
        change(tensors)
        (save_file if name.endswith(".safetensors") else torch.save)(tensors, tmp_path / name)
        if metadata:
            save_file(tensors, tmp_path / name, metadata)
        return tmp_path / name

    return write


def _hollow(path: Path, shapes: Shapes) -> Path:
    tree, end = {}, 0
    for key, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        tree[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(tree).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


@pytest.fixture(scope="session")
def hollow() -> Callable[[Path, Shapes], Path]:
    """A file of zeros in float16 of these shapes, none of which takes any room on the disk."""
    return _hollow


@pytest.fixture
def wide_file(tmp_path: Path) -> Path:
    """A file with a UNet of 155 MB in float16, and with 600 MB of something else."""
    parts = _networks("sd1", unet={"block_out_channels": [320, 640]}, device="meta")
    shapes = {key: tuple(tensor.shape) for key, tensor in _file_of("sd1", parts).items()}
    return _hollow(tmp_path / "wide.safetensors", shapes | {f"made.up.{n}": (10, 10**6) for n in range(30)})


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """A folder, to be changed."""
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "copy"))


_NETWORKS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "unet": UNet2DConditionModel.from_config,
    "vae": AutoencoderKL.from_config,
    "text_encoder": lambda config: CLIPTextModel(CLIPTextConfig(**config)),
    "text_encoder_2": lambda config: CLIPTextModelWithProjection(CLIPTextConfig(**config)),
}


@pytest.fixture(scope="session")
def weights() -> Callable[[Path, str], dict[str, torch.Tensor]]:
    """The tensors of a part of a folder that stands for a file, in the network that its config makes."""

    def read(folder: Path, part: str) -> dict[str, torch.Tensor]:
        config = json.loads((folder / part / "config.json").read_text())
        network = read_weights(lambda: _NETWORKS[part](config), [folder / part / STAND_IN], lambda weight: weight)
        return network.state_dict()

    return read


@pytest.fixture
def write_folder(tmp_path: Path, letters: Path) -> Callable[..., Path]:
    """A miniature of a family in diffusers' format."""

    def write(kind: str, name: str = "folder", dtype: torch.dtype = torch.float16, **schedule: Any) -> Path:
        torch.manual_seed(0)
        folder = tmp_path / name
        for part, network in _networks(kind).items():
            network.to(dtype).save_pretrained(folder / part)
        for place in ("tokenizer", "tokenizer_2")[: 1 + (kind == "sdxl")]:
            shutil.copytree(letters, folder / place)
        (folder / "scheduler").mkdir()
        for file in ("scheduler/scheduler_config.json", "model_index.json"):
            packaged = json.loads((known.family_folder(kind) / file).read_text())
            text = json.dumps(packaged | (schedule if file.startswith("scheduler") else {}))
            (folder / file).write_text(text)
        return folder

    return write
