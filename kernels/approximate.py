"""What a GPU approximates in one instruction, to 2^-22 or better, where Triton writes eight and thirty-six of them.

In Triton's interpreter, and on cards that are not Nvidia's, they are the usual functions.
"""

from __future__ import annotations

import torch

from .launch import constant, interpreted, jit, tl

_PTX = constant(not interpreted() and torch.version.hip is None)


@jit
def log2(x):  # type: ignore[no-untyped-def]
    """log2 of a normal x > 0; -inf for what is smaller."""
    if _PTX:
        y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        y = tl.log2(x)
    return y


@jit
def reciprocal(x):  # type: ignore[no-untyped-def]
    """1 / x of a normal x."""
    if _PTX:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        y = 1.0 / x
    return y
