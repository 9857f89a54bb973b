"""Loads a model as a run does, network by network, and prints seconds, those of the processor, and the peak of memory
in GiB: for bench/compat.py.

    python bench/load_model.py FOLDER|FILE [TOKENIZER]

The libraries' own start is not in the seconds. What is remembered of files is kept in a new folder beside the model.
"""

import sys
import time
from pathlib import Path

import torch
from usage import peaks

from lowvram_db.cache import catalogue_of, model_digest
from lowvram_db.families import open_model
from lowvram_db.reading import Reading


def main(name: str, tokenizer: str | None = None) -> None:
    began, before = time.monotonic(), time.process_time()
    family = open_model(name, reading=Reading(tokenizer=tokenizer))
    catalogue = catalogue_of(Path(name).parent / "catalogue")
    model_digest(family, catalogue)
    catalogue.save()
    for load in (family.load_text_encoders, family.load_vae):
        load()  # and let go
    denoiser = family.load_denoiser(lambda weight: weight.to(torch.bfloat16))
    seconds, process = time.monotonic() - began, time.process_time() - before
    print(f"{seconds:.2f} {process:.2f}", peaks(torch.device("cpu"))["process_gib"])
    del denoiser


if __name__ == "__main__":
    main(*sys.argv[1:])
