"""What a GPU needs beside the tensors that a trace sees, as constants with their source.

None of them has been calibrated on a GPU by this project yet: bench/plan_accuracy.py measures beside them where there
is one. Until then they lean to the safe side.
"""

from typing import Any

import torch
from torch import Tensor

from lowvram_db.memory import segments
from lowvram_db.memory.trace import GRANULE

# The driver's context with torch's and Triton's kernels loaded: 0.3-0.6 GiB on cards of the last ten years (readings of
# nvidia-smi less torch.cuda.memory_reserved that users report). Outside the allocator.
CONTEXT = 512 * 2**20

# cuBLAS keeps one workspace a handle and stream, and backward's thread has a handle of its own. 32 MiB is what
# PyTorch asks for on Hopper and later; 8.1 MiB on older cards (CUBLAS_WORKSPACE_CONFIG in PyTorch's CUDA notes).
CUBLAS_WORKSPACES = 2 * 32 * 2**20

# Of the peak: what the above gets wrong, and what a fragmented allocator cannot hand out again. Where segments do not
# grow SDXL at 1,024 px needed 5.5% more than its trace, with torch 2.11's allocator over a stand-in for the driver.
MARGIN = 0.02 if segments.growing() else 0.06

# Host memory of the process itself, with torch and CUDA's libraries loaded.
RAM_WITH_CUDA = 3 * 2**30

_aten = torch.ops.aten
_WEIGHTS = {  # of convolutions: the places of the weight among arguments, and of its gradient among results
    _aten.convolution: ((1,), ()),
    _aten.convolution_backward: ((2,), (1,)),
}
_ATTENTION_BACKWARD = {
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: 1,  # the place of the query among its arguments
    _aten._scaled_dot_product_flash_attention_backward: 1,
}


def temporaries(operation: Any, args: Any, outputs: Any, *, channels_last: bool = True) -> int:
    """Bytes an operation of a training step needs on a GPU while it runs; for Trace.

    Convolution: cuDNN's tensor-core kernels want channels last and copy operands and result there and back, so as
    much again as they are (its nchwToNhwc and nhwcToNchw kernels); but not a weight and its gradient, where they lie
    so already (channels_last). Activations do not: PyTorch's group norm takes them back to contiguous. Attention
    backward: FlashAttention-2 sums the query's gradient in float32 (`dq_accum` of its flash_bwd).
    """
    if operation in _WEIGHTS:
        weights, gradients = _WEIGHTS[operation] if channels_last else ((), ())
        copied = [x for place, x in enumerate(args[:3]) if place not in weights]
        copied += [x for place, x in enumerate(outputs) if place not in gradients]
        return sum(-(-x.nbytes // GRANULE) * GRANULE for x in copied if isinstance(x, Tensor))
    if operation in _ATTENTION_BACKWARD:
        return int(args[_ATTENTION_BACKWARD[operation]].numel()) * 4
    return 0
