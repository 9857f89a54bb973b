"""A full DreamBooth handed out as a LoRA: what it changed of its base model, in a file of megabytes."""

from contextlib import ExitStack
from pathlib import Path

import torch

from lowvram_db.atomic import replacing_file
from lowvram_db.config import load
from lowvram_db.errors import UserError
from lowvram_db.formats.export import describe_lora, subject_of
from lowvram_db.formats.extract import Extracted, extract
from lowvram_db.formats.lora_file import dtype_for, write_lora
from lowvram_db.formats.stored import open_stored
from lowvram_db.formats.written import check_place
from lowvram_db.reading import AS_IT_IS, Reading
from lowvram_db.run import Run


def export_lora(
    what: str,
    out: Path,
    rank: int,
    base: str | None,
    dtype: torch.dtype,
    device: torch.device,
    reading: Reading = AS_IT_IS,
) -> Extracted:
    """Write a LoRA of that rank to `out`: what a run's model, or a model (folder, file or hub id), is other than its
    base. Returns it, with what is told of it.

    base: default: what the run was trained on. reading: what is known of single files. Raises UserError for what is no
    model, or not made of that base, and where `out` exists.
    """
    check_place(out, 0)
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: a LoRA's name ends in .safetensors")
    if rank < 1:
        raise UserError(f"--rank {rank}: must be at least 1, for example 64")
    run = Run(Path(what).expanduser())
    config = load(run.config) if run.config.is_file() else None
    if config and config.method.name == "lora":
        raise UserError(f"{what}: has trained a LoRA, which lies there already: {run.lora}")
    if config and reading != AS_IT_IS:
        raise UserError(f"{what}: is a run, which knows how its model is read; leave those options out")
    if base is None and config is None:
        raise UserError(f"{what}: is no run, which would know its base model; name that with --base")
    name = base or (config.model.name if config else "")
    read_as = config.model.reading if config and base is None else reading
    with ExitStack() as stack:
        before = stack.enter_context(open_stored(name, read_as))
        after = stack.enter_context(open_stored(str(run.model)) if config else open_stored(what, reading))
        found = extract(before, after, rank, device)
        dtype = dtype_for(found.lora, dtype, out.name)
        metadata = describe_lora(before, out.stem, dtype, name, subject_of(run, config) if config else None)
        with replacing_file(out) as temporary:
            write_lora(temporary, before.family, found.lora, dtype, metadata)
    return found
