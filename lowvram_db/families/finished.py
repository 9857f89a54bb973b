"""A finished network as diffusers and transformers save theirs, in a file that takes no second copy of it."""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lowvram_db.files.writer import overflowing, write_tensors
from lowvram_db.progress import say


def save_network(network: Any, folder: Path, dtype: torch.dtype, written: Path | None = None) -> None:
    """Write config.json and weights into a new folder, by the names that from_pretrained looks for.

    dtype: of the weights; where one of them is larger than it has numbers for, all stay in float32, and that is said.
    written: a file that holds them in this dtype already; it is linked where the disk can do that.
    """
    folder.mkdir()
    weights = network.state_dict()
    if large := overflowing(weights.values(), dtype):
        say(f"{folder.name}: {large} of its tensors hold numbers too large for {_name(dtype)}; it is saved in float32")
        dtype, written = torch.float32, None
    if isinstance(network, PreTrainedModel):
        config: Any = copy.deepcopy(network.config)
        # Without a dtype asked for, diffusers loads its networks in float32, but transformers in the one named here.
        config.architectures, config.dtype = [type(network).__name__], torch.float32
        config.save_pretrained(folder)
        file = folder / "model.safetensors"
    else:
        network.save_config(folder)
        file = folder / "diffusion_pytorch_model.safetensors"
    if written is None or not _linked(written, file):
        write_tensors(file, weights, dtype, metadata={"format": "pt"})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _linked(written: Path, file: Path) -> bool:
    """Two names for one file: each lives on where the other is deleted."""
    try:
        os.link(written, file)
    except OSError:  # a disk without links, as exFAT
        return False
    return True
