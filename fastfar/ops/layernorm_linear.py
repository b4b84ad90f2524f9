"""LayerNorm and the linear layer that reads it: between encoder and decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfar import _native
from fastfar.ops import _launch
from fastfar.ops._registry import op
from fastfar.packing import packed


@op
def layernorm_linear(
    x_BSD: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """W LN(x) + b.

    Args:
        x_BSD: (..., D) floating.
        norm_weight, norm_bias: (D,) affine of the LayerNorm.
        weight, bias: (N, D), (N,).

    Returns:
        (..., N), dtype of x.

    Native: x and the vectors are float32 or bfloat16; the weights, packed or not, are of one of
    these dtypes, which the operands of the products are rounded to; all else is float32. TypeError
    for other dtypes, ValueError for other devices and shapes. Where a gradient is wanted, PyTorch
    computes it.

    Source: MAE, arXiv 2111.06377: the encoder ends in a LayerNorm, the decoder starts with a linear
    layer; as in MAR and FAR.
    """
    h_BSD = F.layer_norm(x_BSD, (x_BSD.shape[-1],), norm_weight, norm_bias, eps)
    return F.linear(h_BSD, weight, bias)


def _native_implementation(
    x_BSD: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-6,
) -> Tensor:
    name = "layernorm_linear"
    tensors = {
        "x_BSD": x_BSD,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "weight": weight,
        "bias": bias,
    }
    if _launch.needs_pytorch(tensors):
        result: Tensor = layernorm_linear.implementations["torch"](*tensors.values(), eps=eps)
        return result
    _launch.check(name, tensors)
    k, n = x_BSD.shape[-1], len(bias)
    _launch.shapes(name, weight=(weight, (n, k)))
    dtype = _launch.compute_dtype(name, weight)
    out_BSN = x_BSD.new_empty(*x_BSD.shape[:-1], n)
    if out_BSN.numel() > 0:
        _launch.launch(
            name,
            dtype=_native.DTYPES[dtype],
            x_dtype=_native.DTYPES[x_BSD.dtype],
            threads=torch.get_num_threads(),
            rows=x_BSD.numel() // k,
            n=n,
            k=k,
            eps=eps,
            x_MK=x_BSD.contiguous(),
            norm_weight=_launch.vector(name, "norm_weight", norm_weight, k),
            norm_bias=_launch.vector(name, "norm_bias", norm_bias, k),
            weight=packed(weight),
            bias=_launch.vector(name, "bias", bias, n),
            out_MN=out_BSN,
        )
    return out_BSN


layernorm_linear.register("native", _native_implementation)
