"""Second half of a pre-norm transformer block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfar import _native
from fastfar.ops import _launch, _mlp_training, _training
from fastfar.ops._registry import op
from fastfar.packing import packed


@op
def layernorm_mlp_residual(
    x_BSD: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    *,
    eps: float = 1e-6,
    dropout: float = 0.0,
) -> Tensor:
    """x + W_2 gelu(W_1 LN(x) + b_1) + b_2, with the exact (erf) GELU.

    Args:
        x_BSD: (B, S, D) floating.
        norm_weight, norm_bias: (D,).
        fc1_weight, fc1_bias: (4 D, D), (4 D,).
        fc2_weight, fc2_bias: (D, 4 D), (D,).
        dropout: probability after the GELU and after the second linear layer (training).

    Returns:
        (B, S, D), dtype of x.

    Native: x and the vectors are float32 or bfloat16; the weights, packed or not, are of one of
    these dtypes, which the operands of the products are rounded to; all else is float32. TypeError
    for other dtypes, ValueError for other devices and shapes. Where a gradient is wanted, products
    have autocast's dtype, if it is on, and gradients of parameters are float32 sums. With dropout
    PyTorch computes it.

    Source: timm's pre-norm ViT block, as used by MAR and FAR.
    """
    h_BSD = F.layer_norm(x_BSD, (x_BSD.shape[-1],), norm_weight, norm_bias, eps)
    h_BSF = F.dropout(F.gelu(F.linear(h_BSD, fc1_weight, fc1_bias)), dropout)
    return x_BSD + F.dropout(F.linear(h_BSF, fc2_weight, fc2_bias), dropout)


def _native_implementation(
    x_BSD: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    *,
    eps: float = 1e-6,
    dropout: float = 0.0,
) -> Tensor:
    name = "layernorm_mlp_residual"
    tensors = {
        "x_BSD": x_BSD,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "fc1_weight": fc1_weight,
        "fc1_bias": fc1_bias,
        "fc2_weight": fc2_weight,
        "fc2_bias": fc2_bias,
    }
    graph = dropout == 0 and _training.wants_graph(*tensors.values())
    if graph and not _training.is_packed(fc1_weight, fc2_weight):
        return _mlp_training.layernorm_mlp_residual(
            x_BSD, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps
        )
    if _launch.needs_pytorch(tensors, dropout):
        result: Tensor = layernorm_mlp_residual.implementations["torch"](
            *tensors.values(), eps=eps, dropout=dropout
        )
        return result
    _launch.check(name, tensors)
    width, hidden = x_BSD.shape[-1], len(fc1_bias)
    _launch.shapes(
        name,
        fc1_weight=(fc1_weight, (hidden, width)),
        fc2_weight=(fc2_weight, (width, hidden)),
    )
    dtype = _launch.compute_dtype(name, fc1_weight, fc2_weight)
    out_BSD = x_BSD.new_empty(x_BSD.shape)
    if out_BSD.numel() > 0:
        _launch.launch(
            name,
            dtype=_native.DTYPES[dtype],
            x_dtype=_native.DTYPES[x_BSD.dtype],
            threads=torch.get_num_threads(),
            rows=x_BSD.numel() // width,
            width=width,
            hidden=hidden,
            eps=eps,
            x_MD=x_BSD.contiguous(),
            norm_weight=_launch.vector(name, "norm_weight", norm_weight, width),
            norm_bias=_launch.vector(name, "norm_bias", norm_bias, width),
            fc1=packed(fc1_weight),
            fc1_bias=_launch.vector(name, "fc1_bias", fc1_bias, hidden),
            fc2=packed(fc2_weight),
            fc2_bias=_launch.vector(name, "fc2_bias", fc2_bias, width),
            out_MD=out_BSD,
        )
    return out_BSD


layernorm_mlp_residual.register("native", _native_implementation)
