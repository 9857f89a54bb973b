"""Where a kernel runs: as Triton on a GPU, in C++ on a CPU where there is that, or as its PyTorch twin everywhere else.

`triton`, `tl` and `jit` can be imported where Triton is not installed: a kernel is then a function nobody calls.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, macOS: the twins do all the work
    triton, tl = None, None


def jit(function: Any = None, **options: Any) -> Any:
    """triton.jit, or nothing at all."""
    if function is None:
        return lambda kernel: jit(kernel, **options)
    return triton.jit(function, **options) if triton else function


def constant(value: Any) -> Any:
    """A number of a module as kernels can read it: compiled, they take no other globals."""
    return tl.constexpr(value) if triton and not interpreted() else value


Choice = Literal["auto", "triton", "torch"]
Implementation = Literal["native", "triton", "torch"]


def interpreted() -> bool:
    """True where TRITON_INTERPRET=1 runs kernels on CPU tensors, slowly, to test them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_triton(choice: Choice, device: torch.device) -> bool:
    """Whether kernels on tensors of `device` run as Triton. Raises RuntimeError where "triton" is asked for in vain."""
    if choice == "torch":
        return False
    if choice == "auto" and device.type != "cuda":
        return False
    why_not = problem(device.type)
    if why_not and choice == "triton":
        raise RuntimeError(f"Triton does not run here: {why_not}")
    if why_not:
        warnings.warn(f"Triton does not run here ({why_not}); PyTorch's own operations are used", stacklevel=2)
    return not why_not


def implementation(choice: Choice | Implementation, device: torch.device) -> Implementation:
    """How a kernel that has all three runs on tensors of `device`; native: its twin where that does not work, which the
    first step finds. A choice made before stays. Raises RuntimeError where "triton" is asked for in vain."""
    if choice == "native" or (choice == "auto" and device.type == "cpu"):
        return "native"
    return "triton" if runs_triton(choice, device) else "torch"


# The release of Triton that a release of torch is built with: another one may miss what torch calls.
_RELEASES = {"2.11": "3.6", "2.12": "3.7", "2.13": "3.7", "2.14": "3.8"}


def mend() -> str:
    """The command that lets Triton run on this system's GPU, by what is missing here."""
    if triton is None:
        package = "triton-windows" if sys.platform == "win32" else "triton"
        release = _RELEASES.get(".".join(torch.__version__.split(".")[:2]))
        return f'pip install "{package}=={release}.*"' if release else f"pip install {package}"
    # On Linux it compiles a piece of C against Python.h; triton-windows brings a compiler and the headers.
    missing = []
    if sys.platform == "linux":
        if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
            missing.append("gcc")
        if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
            missing.append(f"python{sys.version_info.major}.{sys.version_info.minor}-dev")
    reinstall = "triton-windows" if sys.platform == "win32" else "triton"
    return f"apt install {' '.join(missing)}" if missing else f"pip install --force-reinstall {reinstall}"


@functools.cache
def problem(device: str) -> str:
    """Why no kernel can run, found by running one; empty where all is well."""
    if triton is None:
        return "it is not installed"
    if device != "cuda" and not interpreted():
        return f"it has no compiler for {device}"
    try:
        tensor = torch.zeros(8, device=device)
        _add_one[(1,)](tensor, BLOCK=8)
        return "" if bool((tensor == 1).all()) else "a first kernel computed nonsense"
    except Exception as error:  # a broken compiler, driver or cache folder: anything may come
        return _first_line(error)


_RUNNERS: dict[tuple[Any, ...], Callable[..., None]] = {}


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Tensor | int | None, maxnreg: int | None = None, **constants: Any
) -> None:
    """kernel[grid](*arguments, **constants), on the card of the first argument, a tensor: Triton takes the current one.
    constants: in the order of the kernel's signature, after its arguments. maxnreg: the registers a thread may hold.

    Triton looks a compiled kernel up by every argument, in some 40 us of Python, which a step of SD 1.5 pays 300 times.
    Once found it is kept here, by all that Triton compiles for: the types, whether a pointer can be divided by 16, and
    for numbers and the grid simply what they are.
    """
    first = arguments[0]
    assert isinstance(first, Tensor)
    card = first.device.index
    key = (kernel, grid, card, maxnreg, *constants.values(), *map(_compiled_for, arguments))
    runner = _RUNNERS.get(key)
    if runner is not None and card == torch.cuda.current_device():
        runner(*arguments, *constants.values())
        return
    with torch.cuda.device_of(first):
        limits = {} if maxnreg is None else {"maxnreg": maxnreg}
        compiled = kernel[grid](*arguments, **constants, **limits)
        if first.is_cuda:  # the interpreter compiles nothing
            _RUNNERS[key] = compiled[(*grid, 1, 1)[:3]]


def _compiled_for(argument: Tensor | int | None) -> Any:
    return (argument.dtype, argument.data_ptr() % 16) if isinstance(argument, Tensor) else argument


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


@jit
def _add_one(pointer, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    places = pointer + tl.arange(0, BLOCK)
    tl.store(places, tl.load(places) + 1)
