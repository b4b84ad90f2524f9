"""Second half of a pre-norm transformer block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastfar.ops._registry import op


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
        (B, S, D).

    Source: timm's pre-norm ViT block, as used by MAR and FAR.
    """
    h_BSD = F.layer_norm(x_BSD, (x_BSD.shape[-1],), norm_weight, norm_bias, eps)
    h_BSF = F.dropout(F.gelu(F.linear(h_BSD, fc1_weight, fc1_bias)), dropout)
    return x_BSD + F.dropout(F.linear(h_BSF, fc2_weight, fc2_bias), dropout)
