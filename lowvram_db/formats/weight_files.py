"""Which files hold the weights of a part: those that the format's own loader takes, and none that lie beside them."""

from pathlib import Path
from typing import Any

from lowvram_db.errors import UserError
from lowvram_db.files.foreign import read_json
from lowvram_db.files.stand_in import refuse_stand_in
from lowvram_db.reading import STAND_IN

# In the order in which the loaders look: diffusers takes an index before a single file, transformers after it.
_DIFFUSERS = (
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
)
_TRANSFORMERS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def weight_files(folder: Path, part: str) -> list[Path]:
    """The weight files of a model's "unet", "vae" or a text encoder: one file, the shards that an index names, or what
    stands for tensors in a model of one file.

    Raises UserError when there are none, when a shard is missing, and for what is no weights at all.
    """
    if (folder / part / STAND_IN).is_file():
        return [folder / part / STAND_IN]
    names = _TRANSFORMERS if part.startswith("text_encoder") else _DIFFUSERS
    found = next((folder / part / name for name in names if (folder / part / name).is_file()), None)
    if found is None:
        single = next(name for name in names if name.endswith(".safetensors"))
        raise UserError(
            f"{folder / part}: no weights there by the name of {single} (other names, *.fp16.* too, are not read); "
            "the model folder is not complete"
        )
    files = _shards(found) if found.suffix == ".json" else [found]
    for file in files:
        refuse_stand_in(file)
    return files


def _shards(index: Path) -> list[Path]:
    places: Any = read_json(index, "").get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{index}: has no weight_map, which says where each tensor is")
    there = {file.name for file in index.parent.iterdir() if file.is_file()}
    names = sorted(set(map(str, places.values())))
    for name in names:
        if "/" in name or "\\" in name:
            raise UserError(f"{index}: names {name!r}, a file outside its folder")
        if name not in there:
            raise UserError(f"{index}: names {name!r}, which is missing; download it again")
    return [index.parent / name for name in names]
