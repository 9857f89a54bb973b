"""Which arithmetic a device has of its own."""

import torch


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
