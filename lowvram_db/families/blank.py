"""Networks from config files alone: their tensors have shapes and dtypes, and no values worth anything.

Under FakeTensorMode they take no memory at all, which is how a plan looks at a model that nobody has downloaded yet.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from lowvram_db.families.base import Architecture
from lowvram_db.families.conditioning import Conditioning


class Blank(Architecture):
    """A model without weights. Its encode_prompts takes the prompts for empty ones, whose tokens nobody has to know."""

    text_shapes: dict[str, tuple[int, ...]]  # of the text part of the conditioning, one prompt

    def cached_text(self, prompts: list[str]) -> Conditioning:
        """The text part as a cache hands it out: float32, [len(prompts), ...]."""
        return {name: torch.empty(len(prompts), *shape) for name, shape in self.text_shapes.items()}


def blank(
    build: Callable[[], nn.Module],
    dtype: torch.dtype = torch.float32,
    narrow: Callable[[Tensor], Tensor] = lambda weight: weight,
) -> Any:
    """The network that `build` makes, in eval mode, with empty tensors: of `dtype`, or of what `narrow` makes of it."""
    with _disable_current_modes(), torch.device("meta"):  # no initialisation, and nothing for a trace to count
        network = build().eval()
        dtypes = {id(weight): narrow(weight.detach().to(dtype)).dtype for weight in network.parameters()}
    for module in network.modules():
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(weight.shape, dtype=dtypes[id(weight)])))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    return network
