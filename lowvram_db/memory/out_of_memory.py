"""Out of memory, by whichever name: who runs into a full card says so in words of their own.

torch's allocator raises OutOfMemoryError. What takes memory beside it does not (pytorch issue 108645): cuDNN finds no
engine whose workspace fits, cuBLAS cannot make its handle or its workspace, Triton's and CUDA's own calls report the
driver's error. On a CPU it is a RuntimeError of the allocator, or Python's own MemoryError.
"""

import torch

_WORDS = (
    "out of memory",  # CUDA's, Triton's, bitsandbytes'
    "unable to find an engine",  # cuDNN
    "cudnn_status_alloc_failed",
    "cublas_status_alloc_failed",
    "cublas_status_not_initialized",
    "cusolver_status_alloc_failed",
    "can't allocate memory",  # torch's allocator on a CPU, on Linux
    "not enough memory: you tried to allocate",  # and on Windows
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory does not suffice, of a GPU or of the machine."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)


def reason(error: BaseException) -> str:
    """What did not fit, in the first words of the library that says it: without torch's account of the card and advice
    on its own settings, and without a stack of C++."""
    first = str(error).partition(" GPU ")[0].strip().partition("\n")[0]
    return first or type(error).__name__
