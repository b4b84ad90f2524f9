"""Steps of the image autoencoder, KL-16 (MAR, arXiv 2406.11838; latent diffusion, 2112.10752)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def groupnorm_silu(
    x_BCHW: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int,
    eps: float = 1e-6,
    silu: bool = True,
) -> Tensor:
    """silu(GroupNorm(x)), or GroupNorm(x); groups of C / groups neighbouring channels.

    x_BCHW: float. weight, bias: (C,). Returns the shape and dtype of x.
    """
    x_BGN = x_BCHW.reshape(len(x_BCHW), groups, -1)
    centred_BGN = x_BGN - x_BGN.mean(dim=-1, keepdim=True)
    variance_BG1 = centred_BGN.square().mean(dim=-1, keepdim=True)
    normal_BCHW = (centred_BGN / torch.sqrt(variance_BG1 + eps)).reshape(x_BCHW.shape)
    y_BCHW = normal_BCHW * weight[:, None, None] + bias[:, None, None]
    return y_BCHW * torch.sigmoid(y_BCHW) if silu else y_BCHW


def convolution_residual(
    x_BCHW: Tensor, weight: Tensor, bias: Tensor, residual_BCHW: Tensor | None = None
) -> Tensor:
    """residual + convolution(x, weight) + bias, stride 1, zeros around the image.

    weight: (N, C, k, k), k odd. residual_BCHW: (B, N, H, W) or None. Returns (B, N, H, W).
    """
    outputs, _, k, _ = weight.shape
    batch, _, height, width = x_BCHW.shape
    patches_BQL = F.unfold(x_BCHW, k, padding=k // 2)  # (B, C k k, H W)
    y_BNL = weight.reshape(outputs, -1) @ patches_BQL + bias[:, None]
    y_BNHW = y_BNL.reshape(batch, outputs, height, width)
    return y_BNHW if residual_BCHW is None else residual_BCHW + y_BNHW


def upsample_convolution(x_BCHW: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """convolution(x with every pixel four times, weight) + bias, zeros around the image.

    weight: (N, C, 3, 3). Returns (B, N, 2 H, 2 W).
    """
    large_BCHW = x_BCHW.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return convolution_residual(large_BCHW, weight, bias)
