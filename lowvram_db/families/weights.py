"""Weights from disk into a network that has none yet, each narrowed as it is read.

`from_pretrained` brings a whole network in one dtype; a bf16 denoiser whose small tensors stay exact would pass through
memory in fp32 first, at twice the size it is going to have.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowvram_db.errors import UserError

Narrow = Callable[[Tensor], Tensor]


def read_narrowed(network: type[Any], folder: Path, files: list[Path], narrow: Narrow) -> Any:
    """A diffusers network of the config in `folder`, its tensors `narrow`(float32 tensor) of the safetensors `files`.

    Raises UserError for files that are damaged, or hold other tensors than the network has.
    """
    with torch.device("meta"):
        empty = network.from_config(network.load_config(folder))
    state = {}
    try:
        for file in files:
            with safe_open(file, framework="pt") as opened:
                names = list(opened.keys())
            for name in names:
                # Opened anew for each: what was read of a mapped file stays in memory until the file is closed.
                with safe_open(file, framework="pt") as opened:
                    state[name] = narrow(opened.get_tensor(name).to(torch.float32, copy=True))
        empty.load_state_dict(state, assign=True)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise UserError(f"{folder}: its weights cannot be read ({str(error).splitlines()[0]})") from error
    return empty.eval()
