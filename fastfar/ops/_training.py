"""What the ops with a native backward share: the dtype of their products, packing, checks."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfar import _native
from fastfar.packing import PackedWeight, pack

ALLOWED = tuple(_native.DTYPES)


def autocast_dtype() -> torch.dtype | None:
    """What autocast would round the operands of products to; None without autocast on the CPU."""
    if not torch.is_autocast_enabled("cpu"):
        return None
    return torch.get_autocast_dtype("cpu")


def product_dtype(name: str, *weights: Tensor) -> torch.dtype:
    """float32 or bfloat16: autocast's dtype, or else that of all weights.

    Raises TypeError for other dtypes and for weights that differ.
    """
    own = {w.compute_dtype if isinstance(w, PackedWeight) else w.dtype for w in weights}
    dtype = autocast_dtype() or next(iter(own))
    if len(own) > 1 or not own <= set(ALLOWED) or dtype not in ALLOWED:
        given = sorted(map(str, {*own, dtype}))
        raise TypeError(f"native {name}: products in {given}; give one of float32 and bfloat16")
    return dtype


def transposed(weight_NK: Tensor, dtype: torch.dtype) -> PackedWeight:
    """Its transpose in tile order: the weight of the gradient of the input."""
    return pack(weight_NK.detach().t(), dtype)


def is_packed(*weights: Tensor) -> bool:
    """Whether one of them is packed, and so without gradient."""
    return any(isinstance(w, PackedWeight) for w in weights)


def wants_graph(*tensors: Tensor | None) -> bool:
    """Whether the call must be recorded: for autograd, or because a compiler traces it."""
    if torch.compiler.is_compiling():
        return True
    given = [x for x in tensors if x is not None]
    return torch.is_grad_enabled() and any(x.requires_grad for x in given)
