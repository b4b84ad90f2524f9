"""Functions that several kernels use, inlined into them. Arguments are float32 blocks."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def silu(x):
    """x / (1 + exp(-x))."""
    return x * tl.sigmoid(x)
