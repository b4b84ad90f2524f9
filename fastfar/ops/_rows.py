"""What the Triton implementations of the ops on rows share: dtypes, checks, layout."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast rounds the operands of products on x's device to; None where it is off."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def product_dtype(op: str, *weights: Tensor) -> torch.dtype:
    """Of the operands of products: autocast's, or else that of all weights; TypeError if none."""
    own = {w.dtype for w in weights}
    dtype = autocast_dtype(weights[0]) or weights[0].dtype
    if len(own) > 1 or dtype not in DTYPES:
        raise TypeError(
            f"triton {op}: weights of {sorted(map(str, own))}, products in {dtype}; give all "
            "weights in one of float32, float16 and bfloat16"
        )
    return dtype


def check(op: str, **tensors: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Each tensor with its shape: TypeError for a dtype, ValueError for a shape or a device."""
    device = None
    for name, (x, shape) in tensors.items():
        if x is None:
            continue
        if x.dtype not in DTYPES:
            raise TypeError(
                f"triton {op}: {name} is {x.dtype}; give float32, float16 or bfloat16, or use "
                "back end 'torch'"
            )
        if tuple(x.shape) != shape:
            raise ValueError(f"triton {op}: {name} is {tuple(x.shape)}, expected {shape}")
        device = device or x.device
        if x.device != device:
            raise ValueError(f"triton {op}: {name} is on {x.device}, expected {device}")


def recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is computed from these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def rows(x_ND: Tensor) -> Tensor:
    """x itself, or a copy where the numbers of a row do not lie side by side."""
    return x_ND if x_ND.stride(-1) == 1 else x_ND.contiguous()
