"""Networks from config files alone: their tensors have shapes and dtypes, and no values worth anything.

Under FakeTensorMode they take no memory at all, which is how a plan looks at a model that nobody has downloaded yet.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from lowvram_db.families.base import Architecture


class Blank(Architecture):
    """A model without weights."""

    conditioning_shape: tuple[int, int]  # of one prompt

    @abstractmethod
    def load_text_encoders(self, dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
        """Each by its name in the model folder."""

    @abstractmethod
    def conditioning(self, text_encoders: dict[str, Any], rows: int) -> Tensor:
        """What denoise() takes, for `rows` prompts of no meaning: [rows, *conditioning_shape]."""


def blank(
    build: Callable[[], nn.Module],
    dtype: torch.dtype = torch.float32,
    narrow: Callable[[Tensor], Tensor] = lambda weight: weight,
) -> Any:
    """The network that `build` makes, in eval mode, with empty tensors: of `dtype`, or as `narrow` makes them of it."""
    with _disable_current_modes(), torch.device("meta"):  # no initialisation, and nothing for a trace to count
        network = build().eval()
        stored = {id(weight): narrow(weight.detach().to(dtype)) for weight in network.parameters()}
    for module in network.modules():
        for name, weight in module.named_parameters(recurse=False):
            like = stored[id(weight)]
            setattr(module, name, nn.Parameter(torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    return network
