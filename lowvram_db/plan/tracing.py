"""Trace on a CPU as a GPU would do it. What a trace cannot do without values, or a CPU's operations do otherwise than a
GPU's, has a stand-in here, with its reason."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from lowvram_db.kernels import adam8
from lowvram_db.memory.overheads import temporaries
from lowvram_db.memory.trace import TEMPORARY, Trace
from lowvram_db.optim.kinds import Name
from lowvram_db.plan.quantised import as_if_quantised
from lowvram_db.train.interrupt import stop_on_request


@contextmanager
def tracing(autocast: bool = False, optimizer: Name = "adam8", twin: bool = False) -> Iterator[Trace]:
    """Everything inside is traced and nothing computed, as a GPU would do it. twin: adam8 without its kernel. Ctrl-C is
    heard between operations."""
    with ExitStack() as stack:
        stopping = stack.enter_context(stop_on_request())
        trace = Trace(temporaries, stopping)
        # bitsandbytes computes its table of 256 codes, and its kernel, which works in place, has no fake of itself; its
        # state is really made.
        if optimizer == "bnb-adam8":
            stack.enter_context(patch("bitsandbytes.optim.AdamW8bit.update_step", lambda *_: None))
            stack.enter_context(patch("bitsandbytes.functional.create_dynamic_map", lambda **_: torch.empty(256)))
        stack.enter_context(patch("lowvram_db.train.trained.quantise", as_if_quantised))
        tensors = FakeTensorMode(allow_non_fake_inputs=True)
        tensors.cache_enabled = False  # a trace remembers for itself
        stack.enter_context(tensors)
        stack.enter_context(trace)
        if twin:
            stack.enter_context(patch.object(adam8, "update_", partial(_twins_memory, trace)))
        stack.enter_context(patch.object(functional, "group_norm", _contiguous(functional.group_norm)))
        if autocast:
            for norm in ("group_norm", "layer_norm"):
                stack.enter_context(patch.object(functional, norm, _in_float32(getattr(functional, norm))))
        yield trace
        if stopping():
            raise KeyboardInterrupt


def _twins_memory(trace: Trace, weight: Tensor, *_: Any) -> None:
    """What the twin takes for its chunk: to follow its operations would take longer than all the rest of a trace."""
    size = min(weight.numel(), adam8.GPU_CHUNK) * adam8.TWIN_BYTES
    trace.label(TEMPORARY, [torch.empty(size, dtype=torch.uint8)])


def _contiguous(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A GPU's group norm makes its input contiguous and keeps that for backward; a CPU's takes it as it lies."""
    return lambda x, *args, **kwargs: norm(x.contiguous(), *args, **kwargs)


def _in_float32(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A GPU's autocast takes norms in float32, a CPU's does not (torch.amp's op reference, CUDA and CPU)."""

    def wrapped(*args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return norm(*args, **kwargs)
        args = tuple(arg.float() if isinstance(arg, Tensor) else arg for arg in args)
        return norm(*args, **{key: arg.float() if isinstance(arg, Tensor) else arg for key, arg in kwargs.items()})

    return wrapped
