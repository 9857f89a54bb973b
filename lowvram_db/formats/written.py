"""A model on its way to disk, as a single file or as a folder in diffusers' format: tensor by tensor, none kept.

diffusers writes folders out of networks that are whole in memory, and no single files. What scripts that write them get
wrong is decided in names.py and here: the prefix of CLIP's names is written, whatever transformers calls them; the
projection of SDXL's second text encoder is transposed; the VAE keeps its precision; v-prediction is marked.
"""

import json
import math
import shutil
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lowvram_db.atomic import creating_folder, replacing_file
from lowvram_db.errors import UserError
from lowvram_db.files.foreign import read_json
from lowvram_db.files.writer import DTYPES, Planned, overflowing, write_hashed, write_planned
from lowvram_db.formats.forms import to_file
from lowvram_db.formats.header import Entry
from lowvram_db.formats.layout import LAYOUTS
from lowvram_db.formats.modelspec import HASH
from lowvram_db.formats.names import CLIP_COUNT, Form, in_file
from lowvram_db.formats.prediction import V_MARKER, ZERO_SNR_MARKER
from lowvram_db.formats.stored import Model, Network, Readable, predicts
from lowvram_db.progress import say

Dtypes = dict[str, torch.dtype | None]  # by part; None: each tensor's own
_HEADER = 2**20  # bytes, about
_COUNT = torch.arange(77)[None]  # what CLIP's positions are; half-precision merges have spoilt them, and prompts


def dtypes_for(model: Model, dtype: torch.dtype | None) -> Dtypes:
    """The precision of each part in a file: `dtype`, but for the VAE, which keeps its own (SDXL's draws black in fp16),
    and for networks with numbers too large for it, which are float32 then; that is said."""
    dtypes: Dtypes = dict.fromkeys(model.parts, dtype) | {"vae": None}
    for part, network in model.parts.items():
        wider = [one for one in network.values() if (dtypes[part] or one.dtype) == torch.float16 != one.read_as]
        if large := sum(overflowing([stored.read()], torch.float16) for stored in wider):
            say(f"{part}: {large} of its tensors hold numbers too large for float16; it is written in float32")
            dtypes[part] = torch.float32
    return dtypes


def write_single_file(path: Path, model: Model, dtypes: Dtypes, metadata: Mapping[str, str]) -> None:
    """Write the original code's keys of a family, and what the source file has beside them.

    Raises UserError where there is something of that name, and where the disk is too small or cannot be written.
    """
    planned: dict[str, Planned] = {}
    for part, network in model.parts.items():
        planned |= _planned(LAYOUTS[model.family][part].prefix, part, model, network, dtypes[part])
    planned |= _others(model)
    kind, zero_snr = predicts(model.folder)
    markers = [V_MARKER, *([ZERO_SNR_MARKER] if zero_snr else [])] if kind == "v_prediction" else []
    nothing = Planned(torch.float32, (0,), partial(torch.zeros, 0))
    planned |= {marker: nothing for marker in markers if marker not in planned}
    check_place(path, _bytes(planned.values()))
    with replacing_file(path) as temporary:
        write_hashed(temporary, planned, metadata, HASH)


def _planned(prefix: str, part: str, model: Model, network: Network, dtype: torch.dtype | None) -> dict[str, Planned]:
    """A network's tensors as the file has them."""
    places = LAYOUTS[model.family][part].names.places(network)
    if strange := network.keys() - places.keys():
        raise UserError(f"{model.folder / part}: has {min(strange)}, for which the files of its family have no name")
    together: dict[str, dict[Form, Readable]] = {}
    for name, (key, form) in places.items():
        together.setdefault(prefix + key, {})[form] = network[name]
    return {key: _one(forms, dtype) for key, forms in together.items()}


def _one(forms: dict[Form, Readable], dtype: torch.dtype | None) -> Planned:
    (form, stored), *_ = forms.items()

    def read() -> Tensor:
        # Each is good only until the next one is read.
        return to_file({form: stored.read().clone() for form, stored in forms.items()})

    return Planned(dtype or stored.dtype, in_file(stored.shape, form), read)


def _others(model: Model) -> dict[str, Planned]:
    """Of the source file, as it is, but for markers of what is predicted, which follow the model's config."""
    planned = {}
    for key, stored in model.others.items():
        entry: Entry = stored.file.entries[key]
        is_marker = key in (V_MARKER, ZERO_SNR_MARKER)
        if (is_marker and predicts(model.folder)[0] == "epsilon") or entry.dtype not in DTYPES:
            continue
        if key.endswith(CLIP_COUNT) and entry.dtype != "I64":
            planned[key] = Planned(torch.int64, tuple(_COUNT.shape), lambda: _COUNT)
        else:
            planned[key] = Planned(stored.dtype, entry.shape, stored.read)
    return planned


def write_folder(path: Path, model: Model, dtypes: Dtypes) -> None:
    """Write a folder in diffusers' format. Raises UserError as write_single_file does."""
    planned = {
        part: {name: Planned(dtypes[part] or one.dtype, one.shape, one.read) for name, one in network.items()}
        for part, network in model.parts.items()
    }
    check_place(path, sum(_bytes(tensors.values()) for tensors in planned.values()))
    index = read_json(model.folder / "model_index.json", "it names the parts")
    without = {part: [None, None] for part in ("safety_checker", "feature_extractor", "image_encoder") if part in index}
    with creating_folder(path) as temporary:
        text = json.dumps(index | without, indent=2)
        (temporary / "model_index.json").write_text(text + "\n", encoding="utf-8")
        for folder in ("scheduler", *(place.name for place in model.folder.glob("tokenizer*") if place.is_dir())):
            shutil.copytree(model.folder / folder, temporary / folder, copy_function=shutil.copyfile)
        for part, tensors in planned.items():
            (temporary / part).mkdir()
            shutil.copyfile(model.folder / part / "config.json", temporary / part / "config.json")
            name = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
            write_planned(temporary / part / f"{name}.safetensors", tensors, {"format": "pt"})


def _bytes(planned: Iterable[Planned]) -> int:
    return sum(math.prod(one.shape) * one.dtype.itemsize for one in planned)


def check_place(path: Path, wanted: int) -> None:
    """Raises UserError where there is something already, or where so many bytes do not fit on the disk."""
    if path.exists():
        raise UserError(f"{path}: exists already; choose another name")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if wanted + _HEADER > free:
        raise UserError(
            f"{path}: takes {wanted / 1e9:.2f} GB, and {free / 1e9:.2f} are free on that disk; free some space, or "
            "choose another place"
        )
