"""A pre-norm transformer block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastfar.ops import _rows
from fastfar.ops._registry import op
from fastfar.ops.attention import attention as attend
from fastfar.ops.layernorm_attention_residual import layernorm_attention_residual
from fastfar.ops.layernorm_mlp_residual import layernorm_mlp_residual
from fastfar.ops.residual_layernorm import residual_layernorm_rows


@op
def transformer_block(
    x_BSD: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    key_mask_BS: Tensor | None = None,
    *,
    num_heads: int,
    eps: float = 1e-6,
    dropout: float = 0.0,
    attention: str = "auto",
) -> Tensor:
    """y + W_2 gelu(W_1 LN_2(y) + b_1) + b_2, y = x + W_o attention(W_qkv LN_1(x) + b_qkv) + b_o.

    Args:
        x_BSD: (B, S, D) floating.
        norm1_weight, norm1_bias, norm2_weight, norm2_bias: (D,) affine of the LayerNorms.
        qkv_weight, qkv_bias: (3 D, D), (3 D,).
        proj_weight, proj_bias: (D, D), (D,).
        fc1_weight, fc1_bias: (F, D), (F,); F is 4 D in FAR.
        fc2_weight, fc2_bias: (D, F), (D,).
        key_mask_BS: (B, S) bool, True where a key takes part.
        dropout: probability on attention weights, on the projection, after the GELU and after the
            last linear layer (training).
        attention: back end of `fastfar.ops.attention`, its `implementation`.

    Returns:
        (B, S, D), dtype of x.

    PyTorch and native: `layernorm_attention_residual`, then `layernorm_mlp_residual`.

    Triton: float32, float16 or bfloat16; the operands of the products have the dtype of the
    weights, or that of autocast, x keeps its own throughout. Nine kernels without gradients:
    LN, qkv, attention, projection, residual with LN, fc1, GELU, fc2, residual. TypeError and
    ValueError for other dtypes, devices and shapes.

    Source: timm's pre-norm ViT block, as used by MAR and FAR.
    """
    y_BSD = layernorm_attention_residual(
        x_BSD,
        norm1_weight,
        norm1_bias,
        qkv_weight,
        qkv_bias,
        proj_weight,
        proj_bias,
        key_mask_BS,
        num_heads=num_heads,
        eps=eps,
        dropout=dropout,
        attention=attention,
    )
    return layernorm_mlp_residual(
        y_BSD,
        norm2_weight,
        norm2_bias,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
        eps=eps,
        dropout=dropout,
    )


def _triton_implementation(
    x_BSD: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    key_mask_BS: Tensor | None = None,
    *,
    num_heads: int,
    eps: float = 1e-6,
    dropout: float = 0.0,
    attention: str = "auto",
) -> Tensor:
    """See `transformer_block`."""
    name = "transformer_block"
    if x_BSD.dim() != 3 or num_heads < 1 or x_BSD.shape[-1] % num_heads:
        raise ValueError(f"{num_heads} heads do not share {tuple(x_BSD.shape)} of (B, S, D) evenly")
    (batch, length, width), hidden = x_BSD.shape, fc1_bias.shape[0]
    _rows.check(
        name,
        x=(x_BSD, (batch, length, width)),
        qkv_weight=(qkv_weight, (3 * width, width)),
        qkv_bias=(qkv_bias, (3 * width,)),
        proj_weight=(proj_weight, (width, width)),
        proj_bias=(proj_bias, (width,)),
        fc1_weight=(fc1_weight, (hidden, width)),
        fc1_bias=(fc1_bias, (hidden,)),
        fc2_weight=(fc2_weight, (width, hidden)),
        fc2_bias=(fc2_bias, (width,)),
    )
    dtype = _rows.product_dtype(name, qkv_weight, proj_weight, fc1_weight, fc2_weight)

    x_ND = x_BSD.reshape(-1, width)
    _, h_ND = residual_layernorm_rows(x_ND, None, norm1_weight, norm1_bias, eps, dtype)
    qkv = F.linear(h_ND, qkv_weight, qkv_bias.to(qkv_weight.dtype))
    qkv_BS3HE = qkv.view(batch, length, 3, num_heads, width // num_heads)
    heads_BSD = attend(qkv_BS3HE, key_mask_BS, dropout=dropout, implementation=attention)
    update_ND = F.linear(heads_BSD.reshape(-1, width), proj_weight, proj_bias.to(proj_weight.dtype))
    update_ND = F.dropout(update_ND, dropout)
    y_ND, h_ND = residual_layernorm_rows(x_ND, update_ND, norm2_weight, norm2_bias, eps, dtype)

    # Products are cuBLAS's: with GELU or residual inside, ours were slower on an H100.
    h_NF = F.gelu(F.linear(h_ND, fc1_weight, fc1_bias.to(fc1_weight.dtype)))
    h_ND = F.linear(F.dropout(h_NF, dropout), fc2_weight, fc2_bias.to(fc2_weight.dtype))
    return (y_ND + F.dropout(h_ND, dropout).to(y_ND.dtype)).view(x_BSD.shape)


transformer_block.register("triton", _triton_implementation)
