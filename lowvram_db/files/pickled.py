"""Tensors out of a pickle, which is read without letting it run anything."""

import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from lowvram_db.errors import UserError


def unpickle(file: Path) -> Any:
    """A pickle's tensors, mapped where it is a zip; one that wants to run code is not opened. Raises UserError then,
    and whatever torch raises for a file that is damaged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a pickle's protocol
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
        # torch's own words are of how to have the code run
        meaning = (
            f"a pickle that wants to run {wanted[1]}" if wanted else "a damaged pickle, or one of more than tensors,"
        )
        raise UserError(f"{file}: {meaning} is not opened; get the model as .safetensors") from error
