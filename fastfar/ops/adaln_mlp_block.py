"""One residual block of the denoising MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfar.ops._registry import op


@op
def adaln_mlp_block(
    x_NW: Tensor,
    shift_NW: Tensor,
    scale_NW: Tensor,
    gate_NW: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """x + gate * (W_2 silu(W_1 (LN(x) * (1 + scale) + shift) + b_1) + b_2).

    Args:
        x_NW: (N, W) floating, the residual stream.
        shift_NW, scale_NW, gate_NW: (N, W) modulations of each row.
        norm_weight, norm_bias: (W,) affine of the LayerNorm.
        fc1_weight, fc2_weight: (W, W); fc1_bias, fc2_bias: (W,).

    Returns:
        (N, W).

    Source: the denoising MLP of MAR (arXiv 2406.11838, section 4.2), unchanged in FAR.
    """
    h_NW = F.layer_norm(x_NW, (x_NW.shape[-1],), norm_weight, norm_bias, eps)
    # addcmul(a, b, c) = a + b * c in one pass over memory.
    h_NW = torch.addcmul(h_NW + shift_NW, h_NW, scale_NW)
    h_NW = F.linear(F.silu(F.linear(h_NW, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)
    return torch.addcmul(x_NW, gate_NW, h_NW)
