"""First half of a pre-norm transformer block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastfar.ops._registry import op
from fastfar.ops.attention import attention


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
) -> Tensor:
    """x + W_o attention(W_qkv LN(x) + b_qkv) + b_o.

    Args:
        x_BSD: (B, S, D) floating.
        norm_weight, norm_bias: (D,) affine of the LayerNorm.
        qkv_weight, qkv_bias: (3 D, D), (3 D,).
        proj_weight, proj_bias: (D, D), (D,).
        key_mask_BS: (B, S) bool, True where a key takes part.
        dropout: probability on attention weights and on the projection (training).

    Returns:
        (B, S, D).

    Source: timm's pre-norm ViT block, as used by MAR and FAR.
    """
    batch, length, width = x_BSD.shape
    h_BSD = F.layer_norm(x_BSD, (width,), norm_weight, norm_bias, eps)
    qkv = F.linear(h_BSD, qkv_weight, qkv_bias).view(batch, length, 3, num_heads, -1)
    out_BSD = F.linear(attention(qkv, key_mask_BS, dropout=dropout), proj_weight, proj_bias)
    return x_BSD + F.dropout(out_BSD, dropout)
