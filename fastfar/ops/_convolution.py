"""Weights of convolutions in the order in which oneDNN, PyTorch's CPU library, reads them.

Such a weight is one of PyTorch's opaque mkldnn tensors: it keeps its shape and dtype, and spares
oneDNN from reordering the weight in every call. It has no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ONES = (1, 1)


def can_pack(dtype: torch.dtype) -> bool:
    """Can this build of PyTorch, on this machine, run packed convolutions in `dtype`?"""
    mkldnn = torch.ops.mkldnn
    if not hasattr(mkldnn, "_reorder_convolution_weight"):
        return False
    if dtype is torch.bfloat16:
        return bool(mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32


def is_packed(weight: Tensor) -> bool:
    """Did `pack_convolution` make this weight?"""
    return weight.is_mkldnn


def pack_convolution(weight: Tensor, dtype: torch.dtype, padding: int | None = None) -> Tensor:
    """Packed copy in `dtype` of (outputs, inputs, k, k) weights of a stride-1 convolution.

    padding: zeros on each side of the image; None keeps its size.
    """
    padding = weight.shape[-1] // 2 if padding is None else padding
    weight = weight.detach().to(dtype).contiguous()
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
        weight, (padding, padding), _ONES, _ONES, 1
    )
    return packed


def convolve(
    x_BCHW: Tensor, weight: Tensor, bias: Tensor, padding: int, residual_BCHW: Tensor | None = None
) -> Tensor:
    """convolution(x, packed weight) + bias + residual, stride 1; the sum is rounded once."""
    paddings = (padding, padding)
    mkldnn = torch.ops.mkldnn
    x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
    if residual_BCHW is None:
        out: Tensor = mkldnn._convolution_pointwise(
            x_BCHW, weight, bias, paddings, _ONES, _ONES, 1, "none", [], ""
        )
        return out
    residual_BCHW = residual_BCHW.contiguous(memory_format=torch.channels_last)
    out = mkldnn._convolution_pointwise.binary(
        x_BCHW, residual_BCHW, weight, bias, paddings, _ONES, _ONES, 1, "add", 1.0, None, [], None
    )
    return out
