"""Where a kernel runs: as Triton on a GPU, or as its PyTorch twin everywhere else.

`triton`, `tl` and `jit` can be imported where Triton is not installed: a kernel is then a function nobody calls.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch

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


def interpreted() -> bool:
    """True where TRITON_INTERPRET=1 runs kernels on CPU tensors, slowly, to test them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_triton(choice: Choice, device: torch.device) -> bool:
    """Whether kernels on tensors of `device` run as Triton. Raises RuntimeError where "triton" is asked for in vain."""
    if choice == "torch":
        return False
    if choice == "triton":
        problem = _problem(device.type)
        if problem:
            raise RuntimeError(f"Triton does not run here: {problem}")
        return True
    if device.type != "cuda":
        return False
    problem = _problem(device.type)
    if problem:
        warnings.warn(f"Triton does not run here ({problem}); PyTorch's own operations are used", stacklevel=2)
    return not problem


def compiled_for_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, several times faster by torch.compile once it is called; as it is where that does not work, as on a
    machine without a C++ compiler. Every shape it is called with is compiled for itself: give it one."""
    chosen: Callable[..., Any] | None = None

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        nonlocal chosen
        if chosen is None:  # not before: it imports the compiler, which takes half a second
            chosen = torch.compile(function, dynamic=False, fullgraph=True)
        try:
            return chosen(*arguments)
        except Exception as error:  # a compiler that is missing or broken: anything may come
            if chosen is function:
                raise
            warnings.warn(f"torch.compile does not work here ({_first_line(error)}); a step takes longer", stacklevel=2)
            chosen = function
            return function(*arguments)

    return call


@functools.cache
def _problem(device: str) -> str:
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


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


@jit
def _add_one(pointer, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    places = pointer + tl.arange(0, BLOCK)
    tl.store(places, tl.load(places) + 1)
