"""Which attention kernel runs: chosen by name, and tried forward and backward before it is trusted."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lowvram_db.errors import UserError
from lowvram_db.memory.out_of_memory import is_out_of_memory

_HEAD_WIDTHS = (40, 64, 80, 160)  # of Stable Diffusion 1.x and 2.x UNets; kernels give up at odd ones
_TOLERANCE = 0.05  # relative; bf16 rounding alone stays under 0.01


def use_attention(denoiser: Any, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Set the denoiser's attention to "sdpa" or "xformers" and return the one in use.

    "auto" takes PyTorch's own SDPA, which runs the same kernels as xFormers on most cards, and xFormers only where
    SDPA fails its trial. Raises UserError where no wanted backend runs forward and backward on this device.
    """
    failures = []
    for candidate in ["sdpa", "xformers"] if backend == "auto" else [backend]:
        failure = preflight(candidate, device, dtype)
        if failure is None:
            if candidate == "xformers":
                denoiser.enable_xformers_memory_efficient_attention()
            return candidate  # diffusers' models start out with SDPA
        failures.append(f"{candidate} {failure}")
    raise UserError(f"attention: {'; '.join(failures)}" + ('; set attention = "sdpa"' if backend == "xformers" else ""))


def preflight(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Run attention forward and backward on small tensors beside float32 arithmetic; why it failed, or None."""
    try:
        attention = _xformers if backend == "xformers" else scaled_dot_product_attention
        for width in _HEAD_WIDTHS:
            generator = torch.Generator().manual_seed(0)
            qkv = [torch.randn(1, 2, 64, width, generator=generator) for _ in range(3)]
            results = _output_and_gradients(attention, [tensor.to(device, dtype) for tensor in qkv])
            for got, wanted in zip(results, _output_and_gradients(_arithmetic, qkv), strict=True):
                error = float((got.float().cpu() - wanted).norm() / wanted.norm())
                if not error < _TOLERANCE:  # a NaN fails too
                    return f"gives wrong results on {device} at head width {width} (relative error {error:.2g})"
    except ImportError:
        return f"is not installed (pip install {backend})"
    except (RuntimeError, ValueError) as error:
        if is_out_of_memory(error):  # a full card is not the backend's fault
            raise
        return f"does not run on {device}: {str(error).strip().partition(chr(10))[0] or type(error).__name__}"
    return None


def _output_and_gradients(attention: Callable[..., Tensor], qkv: list[Tensor]) -> list[Tensor]:
    """Output and the gradients of its sum of squares; q, k, v are [batch, heads, tokens, width]."""
    leaves = [tensor.clone().requires_grad_() for tensor in qkv]
    output = attention(*leaves)
    return [output.detach(), *torch.autograd.grad(output.float().square().sum(), leaves)]


def _arithmetic(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1) @ v


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    # xFormers wants [batch, tokens, heads, width]
    return memory_efficient_attention(*(x.transpose(1, 2).contiguous() for x in (q, k, v))).transpose(1, 2)
