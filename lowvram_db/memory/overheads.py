"""What a GPU needs beside the tensors that a trace sees, as constants with their source.

Beside the rows of bench/results/plan_accuracy.csv from an H200, the one GPU that this project has measured on, what is
said here leaves 0.07% unexplained for Stable Diffusion 1.5 and 0.11% for SDXL (`--only again`). CONTEXT is other
people's reading.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from lowvram_db.memory import segments
from lowvram_db.memory.trace import GRANULE

# The driver's context with torch's and Triton's kernels loaded: 0.3-0.6 GiB on cards of the last ten years (readings of
# nvidia-smi less torch.cuda.memory_reserved that users report); .76 GiB on an H200, which has more multiprocessors than
# any of them. Outside the allocator.
CONTEXT = 512 * 2**20

# cuBLAS keeps one workspace a handle and stream, and backward's thread has a handle of its own. 32 MiB is what
# PyTorch asks for on Hopper and later; 8.1 MiB on older cards (CUBLAS_WORKSPACE_CONFIG in PyTorch's CUDA notes).
CUBLAS_WORKSPACES = 2 * 32 * 2**20

# Of the peak: what the above gets wrong, and what a fragmented allocator cannot hand out again. Where segments do not
# grow SDXL at 1,024 px needed 5.5% more than its trace, with torch 2.11's allocator over a stand-in for the driver.
# On an H200, where they do, the allocator held 1 to 2.7% more than it gave out, with nothing to make it give back.
MARGIN = 0.02 if segments.growing() else 0.06

# Multiprocessors and the threads at home on each, of the card people own that has most, where none is here to be asked.
_RTX_4090 = 128, 1536

# Host memory of the process itself, with torch and CUDA's libraries loaded.
RAM_WITH_CUDA = 3 * 2**30

_aten = torch.ops.aten
_CONVOLUTIONS = _aten.convolution, _aten.convolution_backward
_ATTENTION_BACKWARD = {
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: 1,  # the place of the query among its arguments
    _aten._scaled_dot_product_flash_attention_backward: 1,
}


def temporaries(operation: Any, args: Any, outputs: Any) -> int:
    """Bytes an operation of a training step needs on a GPU while it runs; for Trace.

    Convolution: cuDNN's tensor-core kernels want channels last and copy every operand and result that does not lie so
    there and back (its nchwToNhwc and nhwcToNchw kernels). Attention backward: FlashAttention-2 sums the query's
    gradient in float32 (`dq_accum` of its flash_bwd), where it is to be deterministic in as many copies as give every
    multiprocessor work. Sums: see summing.
    """
    if operation in _CONVOLUTIONS:
        return sum(_copy(x) for x in (*args[:3], *outputs) if isinstance(x, Tensor) and x.dim() == 4)
    if operation is _aten.native_group_norm_backward and not args[0].is_contiguous():
        return int(args[0].nbytes)
    if operation in _ATTENTION_BACKWARD:
        query = args[_ATTENTION_BACKWARD[operation]]
        copies = 1
        if torch.are_deterministic_algorithms_enabled():
            copies = math.ceil(_card()[0] / (query.shape[0] * query.shape[1]))  # batch and heads
        return int(query.numel()) * 4 * copies
    if operation is _aten.sum and outputs[0].numel():
        return summing(outputs[0].numel(), args[0].numel() // outputs[0].numel())
    return 0


def _copy(x: Tensor) -> int:
    return 0 if x.is_contiguous(memory_format=torch.channels_last) else -(-x.nbytes // GRANULE) * GRANULE


def summing(outputs: int, inputs: int) -> int:
    """Bytes in which blocks of threads leave what they have of a sum of `inputs` rows with `outputs` columns, as the
    gradient of a linear layer's bias is: 96 MiB on an RTX 4090, 21 MiB on a 3060.

    setReduceConfig in ATen/native/cuda/Reduce.cuh, for 16 and 32 bits: a block of 32 by 4 threads, a thread for four
    outputs, and so many blocks for the same outputs that all multiprocessors have work.
    """
    multiprocessors, threads = _card()
    each, columns = math.ceil(inputs / 4), math.ceil(outputs / 128)
    target = multiprocessors * (threads // 128)
    if each < 256 or columns > target:
        return 0
    blocks = max(min(math.ceil(target / columns), math.ceil(each / 16)), math.ceil(each / 256))
    return 4 * outputs * blocks * 128 if blocks > 1 else 0


@functools.cache
def _card() -> tuple[int, int]:
    if not torch.cuda.is_available():
        return _RTX_4090
    properties = torch.cuda.get_device_properties()
    return properties.multi_processor_count, properties.max_threads_per_multi_processor
