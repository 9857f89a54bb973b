"""Which arithmetic a device has of its own, and whether it repeats itself."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Whether, meanwhile, only kernels run that give the same bits each time. On a GPU the usual backward of attention
    adds up in the order in which its threads come; on a CPU nothing here does. From before cuBLAS is first used on."""
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without which torch refuses cuBLAS then
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a search for faults
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def is_native(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device computes in this dtype (float32, bfloat16 or float16) by itself.

    For a CPU oneDNN answers, whose kernels PyTorch runs there: on x86 bf16 takes AVX-512, and fp16 its FP16 extension.
    Where it has none, layers take 12 to 100 times as long as in float32 (docs/arithmetic.md).
    """
    if dtype == torch.float32:
        return True
    if device.type == "cuda":
        return dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    if not torch.backends.mkldnn.is_available():
        return False
    onednn = torch.ops.mkldnn
    supported = onednn._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else onednn._is_mkldnn_fp16_supported
    return bool(supported())
