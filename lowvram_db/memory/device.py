"""The device a run uses, and how much memory it took at its peak."""

import ctypes
import gc
import sys

import torch
from torch import Tensor, nn

from lowvram_db.errors import UserError
from lowvram_db.memory import segments
from lowvram_db.memory.arithmetic import is_native
from lowvram_db.memory.heap import keep_freed_memory
from lowvram_db.progress import say

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device() -> torch.device:
    """The GPU where there is one, else the CPU. Allocators are told to take memory from the card in segments
    that grow, and to keep what is freed of a CPU's."""
    segments.grow()
    _settle_arithmetic()
    if not torch.cuda.is_available():
        keep_freed_memory()
        return torch.device("cpu")
    if (
        segments.asked()
    ):  # again: importing bitsandbytes, as diffusers does, has made the allocator read its environment
        torch._C._accelerator_setAllocatorSettings(segments.GROWING)
    # By number: where two are there, nothing later means another one.
    return torch.device("cuda", torch.cuda.current_device())


def _settle_arithmetic() -> None:
    """What torch leaves to taste, or changes from release to release; docs/arithmetic.md has the reasons."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False


def compute_dtype(compute: str, device: torch.device) -> torch.dtype:
    """What the `precision.compute` setting computes in: float32 on a CPU that would only emulate it. Raises UserError
    where a card has no such arithmetic."""
    if is_native(DTYPES[compute], device):
        return DTYPES[compute]
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        raise UserError(
            f'precision.compute: {name} has no bf16 arithmetic; set precision.compute = "fp16", and leave '
            "precision.weights out"
        )
    return torch.float32


def emulation(compute: str, device: torch.device) -> str:
    """What to say of the `precision.compute` setting where the CPU only emulates it; else empty."""
    if not _emulates(DTYPES[compute], device):
        return ""
    return "emulated on this CPU, up to 100 times slower; computing in fp32"


def say_emulation(compute: str, device: torch.device) -> None:
    """For commands that compute in this setting, before they do."""
    if problem := emulation(compute, device):
        say(f"{compute}: {problem}")


def _emulates(dtype: torch.dtype, device: torch.device) -> bool:
    return device.type != "cuda" and not is_native(dtype, device)


def picture_dtypes(compute: str, device: torch.device) -> tuple[torch.dtype, torch.dtype | None]:
    """The dtype of class images and of samples from a finished model, and the one for a model that overflows in it.

    fp16 on a GPU that computes in half precision anyway: pictures then differ from those in fp32 by 0.13 of 255 in the
    mean, in bf16 by 1.47. What overflows is drawn in bf16, which takes no more memory, or fp32 where there is none.
    """
    dtype = compute_dtype(compute, device)
    if device.type != "cuda" or dtype == torch.float32:
        return dtype, None
    return torch.float16, torch.float32 if compute == "fp16" else torch.bfloat16


def encoder_dtype(setting: str, compute: str, device: torch.device) -> torch.dtype:
    """The dtype of the `cache.precision` setting: "auto" is fp16 on a GPU that will train in half precision anyway (it
    is finer than bf16, and what overflows is encoded again in fp32), else fp32. So is what a CPU would only emulate."""
    if setting == "auto":
        setting = "fp16" if device.type == "cuda" and compute != "fp32" else "fp32"
    return torch.float32 if _emulates(DTYPES[setting], device) else DTYPES[setting]


def lay_out(network: nn.Module, device: torch.device) -> None:
    """Let the weights of convolutions lie as the device's kernels read them: on a GPU channels last, or cuDNN copies
    each of them, and its gradient, at every call: 70% of 12.4 GB a step of Stable Diffusion 1.5."""
    if device.type == "cuda":
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # which torch's stubs lack


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, by a copy that neither waits for the kernels before it nor is waited for."""
    # The allocator of pinned memory hands out no block again before the copy that reads it is done.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def reset_peak(device: torch.device) -> None:
    """Let peak_bytes count from here on a GPU; a process's own peak cannot be taken back."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far: what the allocator gave out on a GPU, the whole process on a CPU. Bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def free_bytes(device: torch.device) -> int:
    """What a GPU has left for this process, with what PyTorch holds for reuse, under the allocator's cap. Bytes."""
    free, total = torch.cuda.mem_get_info(device)
    most = int(total * torch.cuda.get_per_process_memory_fraction(device.index))  # takes none without
    return min(free + torch.cuda.memory_reserved(device), most) - torch.cuda.memory_allocated(device)


def release_memory() -> None:
    """Give back what dropped networks held, on the CPU and on the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:  # glibc, which else keeps most of it for itself
        trim(0)
