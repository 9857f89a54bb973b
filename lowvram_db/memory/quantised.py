"""Frozen matrices in 8 or 4 bits a weight, by bitsandbytes; convolutions, norms and biases stay as they are."""

from typing import Any, Literal

import torch
from torch import nn

from lowvram_db.errors import UserError

Base = Literal["int8", "nf4"]


def quantise(network: nn.Module, base: Base, compute: torch.dtype) -> None:
    """Let every matrix of a network on the CPU be held in `base` from now on, in place; peft knows it for what it is.

    compute: the dtype of its arithmetic. Raises UserError where bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
    except ImportError as error:
        raise UserError(f"method.base: {base} needs bitsandbytes: pip install bitsandbytes") from error
    for name, layer in [named for named in network.named_modules() if type(named[1]) is nn.Linear]:
        shape, biased = (layer.in_features, layer.out_features), layer.bias is not None
        narrow: Any
        with torch.device("meta"):
            if base == "nf4":
                narrow = Linear4bit(*shape, biased, compute_dtype=compute, quant_type="nf4")
            else:
                narrow = Linear8bitLt(*shape, biased, has_fp16_weights=False)
        if base == "nf4":
            narrow.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=narrow)
        else:
            narrow.weight = Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
        narrow.bias = layer.bias
        network.set_submodule(name, narrow.to("cpu"))
    setattr(network, "is_loaded_in_4bit" if base == "nf4" else "is_loaded_in_8bit", True)
