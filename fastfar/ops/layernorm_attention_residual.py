"""First half of a pre-norm transformer block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfar import _native
from fastfar.ops import _attention, _launch
from fastfar.ops._registry import op
from fastfar.ops.attention import attention as attend
from fastfar.ops.linear import linear
from fastfar.packing import packed


@op
def layernorm_attention_residual(
    x_BSD: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    key_mask_BS: Tensor | None = None,
    *,
    num_heads: int,
    eps: float = 1e-6,
    dropout: float = 0.0,
    attention: str = "auto",
) -> Tensor:
    """x + W_o attention(W_qkv LN(x) + b_qkv) + b_o.

    Args:
        x_BSD: (B, S, D) floating.
        norm_weight, norm_bias: (D,) affine of the LayerNorm.
        qkv_weight, qkv_bias: (3 D, D), (3 D,).
        proj_weight, proj_bias: (D, D), (D,).
        key_mask_BS: (B, S) bool, True where a key takes part.
        dropout: probability on attention weights and on the projection (training).
        attention: back end of `fastfar.ops.attention`, its `implementation`.

    Returns:
        (B, S, D), dtype of x.

    Native: x and the vectors are float32 or bfloat16; the weights, packed or not, are of one of
    these dtypes, which the operands of the products are rounded to; all else is float32. TypeError
    for other dtypes, ValueError for other devices and shapes. With dropout, or where a gradient or
    a back end of attention by name is wanted, PyTorch computes all but the two linear layers.

    Source: timm's pre-norm ViT block, as used by MAR and FAR.
    """
    batch, length, width = x_BSD.shape
    h_BSD = F.layer_norm(x_BSD, (width,), norm_weight, norm_bias, eps)
    qkv = linear(h_BSD, qkv_weight, qkv_bias).view(batch, length, 3, num_heads, width // num_heads)
    heads_BSD = attend(qkv, key_mask_BS, dropout=dropout, implementation=attention)
    return x_BSD + F.dropout(linear(heads_BSD, proj_weight, proj_bias), dropout)


def _native_implementation(
    x_BSD: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    key_mask_BS: Tensor | None = None,
    *,
    num_heads: int,
    eps: float = 1e-6,
    dropout: float = 0.0,
    attention: str = "auto",
) -> Tensor:
    name = "layernorm_attention_residual"
    tensors = {
        "x_BSD": x_BSD,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "qkv_weight": qkv_weight,
        "qkv_bias": qkv_bias,
        "proj_weight": proj_weight,
        "proj_bias": proj_bias,
    }
    by_name = _attention.asked_for(attention)[0] != "auto"
    if _launch.needs_pytorch(tensors, dropout) or by_name:
        result: Tensor = layernorm_attention_residual.implementations["torch"](
            *tensors.values(),
            key_mask_BS,
            num_heads=num_heads,
            eps=eps,
            dropout=dropout,
            attention=attention,
        )
        return result
    _launch.check(name, tensors)
    if x_BSD.dim() != 3 or num_heads < 1 or x_BSD.shape[-1] % num_heads != 0:
        raise ValueError(f"{num_heads} heads do not share {tuple(x_BSD.shape)} of (B, S, D) evenly")
    batch, length, width = x_BSD.shape
    _launch.shapes(
        name,
        qkv_weight=(qkv_weight, (3 * width, width)),
        proj_weight=(proj_weight, (width, width)),
    )
    dtype = _launch.compute_dtype(name, qkv_weight, proj_weight)
    key_mask_BS = _launch.key_mask(name, key_mask_BS, batch, length)
    out_BSD = x_BSD.new_empty(x_BSD.shape)
    if out_BSD.numel() > 0:
        _launch.launch(
            name,
            dtype=_native.DTYPES[dtype],
            x_dtype=_native.DTYPES[x_BSD.dtype],
            threads=torch.get_num_threads(),
            batch=batch,
            length=length,
            heads=num_heads,
            width=width,
            eps=eps,
            x_BSD=x_BSD.contiguous(),
            norm_weight=_launch.vector(name, "norm_weight", norm_weight, width),
            norm_bias=_launch.vector(name, "norm_bias", norm_bias, width),
            qkv=packed(qkv_weight),
            qkv_bias=_launch.vector(name, "qkv_bias", qkv_bias, 3 * width),
            proj=packed(proj_weight),
            proj_bias=_launch.vector(name, "proj_bias", proj_bias, width),
            key_mask_BS=key_mask_BS,
            out_BSD=out_BSD,
        )
    return out_BSD


layernorm_attention_residual.register("native", _native_implementation)
