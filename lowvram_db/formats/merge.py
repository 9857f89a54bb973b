"""A model and a LoRA made one model."""

import math
from pathlib import Path

import torch

from lowvram_db.errors import UserError
from lowvram_db.formats.export import Format, write
from lowvram_db.formats.lora_file import read_lora
from lowvram_db.formats.merged import merged
from lowvram_db.formats.stored import open_stored
from lowvram_db.formats.written import check_place
from lowvram_db.reading import AS_IT_IS, Reading


def merge(
    name: str, path: Path, weight: float, out: Path, dtype: torch.dtype | None = None, reading: Reading = AS_IT_IS
) -> None:
    """Write a model (its folder, file or hub id) with the LoRA of a file in it: to a single file where the name of
    `out` ends in .safetensors, else to a folder in diffusers' format.

    Raises UserError for what is no model or no LoRA for it, and where `out` exists or does not fit on its disk.
    """
    if not math.isfinite(weight):
        raise UserError(f"--weight {weight}: must be a number, for example 0.8")
    check_place(out, 0)
    form = Format.single_file if out.suffix == ".safetensors" else Format.diffusers
    with open_stored(name, reading, form is Format.diffusers) as model:
        write(merged(model, read_lora(path, model, name), weight), out, form, dtype, None)
