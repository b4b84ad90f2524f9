"""Bidirectional softmax attention."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfar import _native
from fastfar.ops import _attention, _launch
from fastfar.ops._registry import op


@op
def attention(
    qkv_BS3HE: Tensor,
    key_mask_BS: Tensor | None = None,
    *,
    dropout: float = 0.0,
    implementation: str = "auto",
) -> Tensor:
    """out = softmax(q k^T / sqrt(E)) v over all positions.

    Args:
        qkv_BS3HE: (B, S, 3, heads, E) floating; queries, keys and values side by side.
        key_mask_BS: (B, S) bool, True where a key takes part; None is all of them. An image
            without any gives 0.
        dropout: probability on the attention weights (training).
        implementation: "auto" or a back end of `backend.ATTENTIONS`; "auto" is FASTFAR_ATTENTION,
            and where that is not set either, on a CUDA device PyTorch's flash kernel if it takes
            the call, else what PyTorch chooses.

    Returns:
        (B, S, heads * E), dtype of the input.

    Raises:
        ValueError: the implementation is not known, or cannot serve this call: the message says
            why and which can.

    Under torch.use_deterministic_algorithms(True) only back ends with a deterministic backward
    train.

    Native: float32, or bfloat16 operands with scores and softmax in float32; TypeError for other
    dtypes, ValueError for other devices and shapes. With dropout, or where a gradient or a back end
    by name is wanted, PyTorch computes it.

    Source: Vaswani et al. 2017, eq. 1; layout of timm's Attention.
    """
    return _attention.run(qkv_BS3HE, key_mask_BS, dropout, implementation)


def _native_implementation(
    qkv_BS3HE: Tensor,
    key_mask_BS: Tensor | None = None,
    *,
    dropout: float = 0.0,
    implementation: str = "auto",
) -> Tensor:
    by_name = _attention.asked_for(implementation)[0] != "auto"
    if by_name or _launch.needs_pytorch({"qkv_BS3HE": qkv_BS3HE}, dropout):
        return _attention.run(qkv_BS3HE, key_mask_BS, dropout, implementation)
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
