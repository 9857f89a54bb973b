"""A model and a LoRA made one model."""

from pathlib import Path

import torch

from lowvram_db.formats.export import Format, write
from lowvram_db.formats.lora_file import BASE, base_of, read_lora
from lowvram_db.formats.merged import merged
from lowvram_db.formats.reading import AS_IT_IS, Reading
from lowvram_db.formats.stored import Model, open_stored
from lowvram_db.formats.written import check_place
from lowvram_db.progress import say


def merge(
    name: str, path: Path, weight: float, out: Path, dtype: torch.dtype | None = None, reading: Reading = AS_IT_IS
) -> None:
    """Write a model (its folder, file or hub id) with the LoRA of a file in it: to a single file where the name of
    `out` ends in .safetensors, else to a folder in diffusers' format.

    Raises UserError for what is no model or no LoRA for it, and where `out` exists or does not fit on its disk.
    """
    check_place(out, 0)
    form = Format.single_file if out.suffix == ".safetensors" else Format.diffusers
    with open_stored(name, reading, form is Format.diffusers) as model:
        lora, said = read_lora(path, model)
        _warn_of_another_base(path, said, model, name)
        write(merged(model, lora, weight), out, form, dtype, None)


def _warn_of_another_base(path: Path, metadata: dict[str, str], model: Model, name: str) -> None:
    """Say where a LoRA was made for another model than this one."""
    if metadata.get(BASE) not in (None, base_of(model)):
        title = metadata.get("ss_sd_model_name")
        trained_on = f"{title}, or that has been changed" if title else "another model"
        say(f"{path.name}: was not made for {name} but for {trained_on}; pictures may differ from its own")
