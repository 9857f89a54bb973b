import pytest
import torch

from lowvram_db.memory.out_of_memory import is_out_of_memory, reason

TORCHS = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 11.75 GiB of which 6.38 MiB is "
    "free. Of the allocated memory 10 GiB is allocated by PyTorch"
)
# As the libraries say it, on cards and machines that were full.
FULL = [
    torch.OutOfMemoryError(TORCHS),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("FIND was unable to find an engine to execute this computation after trying 8 plans."),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
    ),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to allocate"
    ),
    MemoryError(),
]
OTHER = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("Expected all tensors to be on the same device"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
    ValueError("out of memory"),
    KeyboardInterrupt(),
    OSError(28, "No space left on device"),
]


@pytest.mark.parametrize("error", FULL, ids=str)
def test_every_name_of_it_is_known(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", OTHER, ids=str)
def test_nothing_else_is_taken_for_it(error):
    assert not is_out_of_memory(error)


def test_the_cpus_allocator_speaks_so():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_the_reason_is_short():
    assert reason(FULL[0]) == "CUDA out of memory. Tried to allocate 20.00 MiB."
    assert reason(FULL[1]) == "CUDA error: out of memory"
    assert reason(MemoryError()) == "MemoryError"
