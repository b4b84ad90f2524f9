"""Bidirectional softmax attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfar import _native
from fastfar.ops import _launch
from fastfar.ops._registry import op


@op
def attention(
    qkv_BS3HE: Tensor, key_mask_BS: Tensor | None = None, *, dropout: float = 0.0
) -> Tensor:
    """out = softmax(q k^T / sqrt(E)) v over all positions.

    Args:
        qkv_BS3HE: (B, S, 3, heads, E) floating; queries, keys and values side by side.
        key_mask_BS: (B, S) bool, True where a key takes part; None is all of them. An image
            without any gives 0.
        dropout: probability on the attention weights (training).

    Returns:
        (B, S, heads * E), dtype of the input.

    Native: float32, or bfloat16 operands with scores and softmax in float32; TypeError for other
    dtypes, ValueError for other devices and shapes. With dropout, or where a gradient is wanted,
    PyTorch computes it.

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


def _native_implementation(
    qkv_BS3HE: Tensor, key_mask_BS: Tensor | None = None, *, dropout: float = 0.0
) -> Tensor:
    if _launch.needs_pytorch({"qkv_BS3HE": qkv_BS3HE}, dropout):
        result: Tensor = attention.implementations["torch"](qkv_BS3HE, key_mask_BS, dropout=dropout)
        return result
    _launch.check("attention", {"qkv_BS3HE": qkv_BS3HE})
    if qkv_BS3HE.dim() != 5 or qkv_BS3HE.shape[2] != 3:
        raise ValueError(f"qkv is (B, S, 3, heads, E), got {tuple(qkv_BS3HE.shape)}")
    batch, length, _, heads, width = qkv_BS3HE.shape
    key_mask_BS = _launch.key_mask("attention", key_mask_BS, batch, length)
    out_BSD = qkv_BS3HE.new_empty(batch, length, heads * width)
    if out_BSD.numel() > 0:
        _launch.launch(
            "attention",
            dtype=_native.DTYPES[qkv_BS3HE.dtype],
            threads=torch.get_num_threads(),
            batch=batch,
            length=length,
            heads=heads,
            width=width,
            qkv_BS3HE=qkv_BS3HE.contiguous(),
            key_mask_BS=key_mask_BS,
            out_BSD=out_BSD,
        )
    return out_BSD


attention.register("native", _native_implementation)
