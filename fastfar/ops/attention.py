"""Bidirectional softmax attention."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastfar.ops._registry import op


@op
def attention(
    qkv_BS3HE: Tensor, key_mask_BS: Tensor | None = None, *, dropout: float = 0.0
) -> Tensor:
    """out = softmax(q k^T / sqrt(E)) v over all positions.

    Args:
        qkv_BS3HE: (B, S, 3, heads, E) floating; queries, keys and values side by side.
        key_mask_BS: (B, S) bool, True where a key takes part; None is all of them.
        dropout: probability on the attention weights (training).

    Returns:
        (B, S, heads * E), dtype of the input.

    Source: Vaswani et al. 2017, eq. 1; layout of timm's Attention.
    """
    q, k, v = qkv_BS3HE.permute(2, 0, 3, 1, 4).unbind(0)
    mask = None if key_mask_BS is None else key_mask_BS[:, None, None, :]
    if q.requires_grad and q.device.type == "cpu":
        out_BHSE = _attention_for_backward(q, k, v, mask, dropout)
    else:
        out_BHSE = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return out_BHSE.transpose(1, 2).flatten(2)


def _attention_for_backward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float
) -> Tensor:
    """The formula spelt out: PyTorch's CPU flash backward takes a multiple of this at S < 600."""
    scores_BHSS = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    if mask is not None:
        scores_BHSS = scores_BHSS.masked_fill(~mask, float("-inf"))
    weights_BHSS = F.dropout(scores_BHSS.softmax(dim=-1), dropout)
    return weights_BHSS.to(v.dtype) @ v
