"""The denoising MLP: one token, one diffusion step (MAR's head plus a level input)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

LAYERNORM_EPS = 1e-6


def timestep_embedding(t_N: Tensor, dim: int, dtype: torch.dtype, period: float = 1e4) -> Tensor:
    """(N, dim) sinusoids of t: cosines, then sines, of the frequencies period^(-j / (dim/2))."""
    half = dim // 2
    exponent = torch.arange(half, dtype=dtype, device=t_N.device) / half
    angle = t_N.to(dtype).unsqueeze(-1) * torch.exp(-math.log(period) * exponent)
    return torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1)


def linear(x_MK: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W^T + b. x_MK: float (..., K). weight: (N, K). bias: (N,). Returns (..., N)."""
    return F.linear(x_MK, weight, bias)


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
    eps: float = LAYERNORM_EPS,
) -> Tensor:
    """x + gate * fc2(silu(fc1(LN(x) * (1 + scale) + shift))): one residual block of the head.

    x_NW and the three modulations: float (N, W). fc1_weight, fc2_weight: (W, W). Returns (N, W).
    """
    h_NW = F.layer_norm(x_NW, x_NW.shape[-1:], norm_weight, norm_bias, eps)
    h_NW = h_NW * (1 + scale_NW) + shift_NW
    h_NW = F.linear(F.silu(F.linear(h_NW, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)
    return x_NW + gate_NW * h_NW


def head_forward(
    head: Mapping[str, Tensor], x_NP: Tensor, t_N: Tensor, condition_ND: Tensor, level_N: Tensor
) -> Tensor:
    """(eps, v) = head(x, t, z, level).

    head: keys without the prefix `diffloss.net.`. x_NP: noisy tokens. t_N: timestep of the unspaced
    schedule. condition_ND: z. level_N: the raw level number. Returns (N, 2 P): epsilon, then the
    variance channel v.
    """

    def layer(name: str, x: Tensor) -> Tensor:
        return linear(x, head[f"{name}.weight"], head[f"{name}.bias"])

    sinusoid = timestep_embedding(t_N, head["time_embed.mlp.0.weight"].shape[1], x_NP.dtype)
    time_NW = layer("time_embed.mlp.2", F.silu(layer("time_embed.mlp.0", sinusoid)))
    level_NW = layer("index_cond_embed", level_N.to(x_NP.dtype).unsqueeze(-1))
    y_NW = F.silu(time_NW + layer("cond_embed", condition_ND) + level_NW)

    x_NW = layer("input_proj", x_NP)
    block = 0
    while f"res_blocks.{block}.in_ln.weight" in head:
        prefix = f"res_blocks.{block}"
        shift_NW, scale_NW, gate_NW = layer(f"{prefix}.adaLN_modulation.1", y_NW).chunk(3, dim=-1)
        x_NW = adaln_mlp_block(
            x_NW,
            shift_NW,
            scale_NW,
            gate_NW,
            head[f"{prefix}.in_ln.weight"],
            head[f"{prefix}.in_ln.bias"],
            head[f"{prefix}.mlp.0.weight"],
            head[f"{prefix}.mlp.0.bias"],
            head[f"{prefix}.mlp.2.weight"],
            head[f"{prefix}.mlp.2.bias"],
        )
        block += 1

    shift_NW, scale_NW = layer("final_layer.adaLN_modulation.1", y_NW).chunk(2, dim=-1)
    x_NW = F.layer_norm(x_NW, x_NW.shape[-1:], eps=LAYERNORM_EPS)
    return layer("final_layer.linear", x_NW * (1 + scale_NW) + shift_NW)
