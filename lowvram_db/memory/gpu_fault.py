"""A GPU that cannot go on: it is off its bus, its driver has begun anew, a kernel went where it must not. Whatever this
process asks of it from then on fails likewise."""

_WORDS = ("CUDA error", "Triton Error [CUDA]", "CUDNN_STATUS_EXECUTION_FAILED")


def is_gpu_fault(error: BaseException) -> bool:
    """Whether an error says so, by whichever library."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def told(error: BaseException) -> str:
    """In one line, with the mend."""
    first = str(error).partition("\n")[0]
    return (
        f"the GPU cannot go on ({first}); finished work is kept, and the same command goes on from there; "
        "should it come again, look at its driver, power and temperature: nvidia-smi, dmesg"
    )
