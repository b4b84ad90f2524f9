"""The denoising MLP: eps and variance of one token given its condition.

Parameter names are those of the published checkpoints (under `diffloss.net`).

Source: MAR, arXiv 2406.11838, section 4.2; FAR adds the embedding of the frequency level.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfar.config import FARConfig
from fastfar.diffusion import timestep_embedding
from fastfar.ops import adaln_mlp_block, linear

EPS = 1e-6
TIME_FEATURES = 256


class TimestepEmbedder(nn.Module):
    """W_2 silu(W_1 sinusoid(t))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, timestep_N: Tensor) -> Tensor:
        dtype = _linear(self.mlp, 0).weight.dtype
        exact = torch.promote_types(dtype, torch.float32)
        features = timestep_embedding(timestep_N, TIME_FEATURES, exact)
        h_NW = F.silu(_apply(_linear(self.mlp, 0), features.to(dtype)))
        return _apply(_linear(self.mlp, 2), h_NW)


def _linear(layers: nn.Sequential, index: int) -> nn.Linear:
    """Layer `index`, known to be linear."""
    layer = layers[index]
    assert isinstance(layer, nn.Linear)
    return layer


def _apply(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer through the op, which has native kernels."""
    return linear(x, layer.weight, layer.bias)


def _modulation(width: int, count: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(width, count * width))


class ResBlock(nn.Module):
    """x + gate * MLP(LN(x) * (1 + scale) + shift), modulated by the condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = _modulation(width, 3)

    def forward(self, x_NW: Tensor, activated_NW: Tensor) -> Tensor:
        """activated_NW: SiLU of the condition, which all modulations share."""
        fc1, fc2 = _linear(self.mlp, 0), _linear(self.mlp, 2)
        modulation = _apply(_linear(self.adaLN_modulation, 1), activated_NW)
        shift_NW, scale_NW, gate_NW = modulation.chunk(3, dim=-1)
        return adaln_mlp_block(
            x_NW,
            shift_NW,
            scale_NW,
            gate_NW,
            self.in_ln.weight,
            self.in_ln.bias,
            fc1.weight,
            fc1.bias,
            fc2.weight,
            fc2.bias,
            eps=EPS,
        )


class FinalLayer(nn.Module):
    """Linear(LN(x) * (1 + scale) + shift), LN without affine."""

    def __init__(self, width: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out_features)
        self.adaLN_modulation = _modulation(width, 2)

    def forward(self, x_NW: Tensor, activated_NW: Tensor) -> Tensor:
        modulation = _apply(_linear(self.adaLN_modulation, 1), activated_NW)
        shift_NW, scale_NW = modulation.chunk(2, dim=-1)
        h_NW = F.layer_norm(x_NW, (x_NW.shape[-1],), eps=EPS)
        return _apply(self.linear, h_NW * (1 + scale_NW) + shift_NW)


class DenoisingMLP(nn.Module):
    """Maps (x_t, t, z, level) of every row to eps and the variance channel.

    forward(x_NP, timestep_N, condition_ND, level_N) -> (N, 2 P): x_NP (N, P) is the noised token,
    timestep_N (N,) its diffusion time, condition_ND (N, D) the transformer's output and level_N
    (N,) the frequency level as a number.
    """

    def __init__(self, config: FARConfig) -> None:
        super().__init__()
        width = config.head_width
        self.time_embed = TimestepEmbedder(width)
        self.cond_embed = nn.Linear(config.width, width)
        self.index_cond_embed = nn.Linear(1, width)
        self.input_proj = nn.Linear(config.token_dim, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(config.head_depth))
        self.final_layer = FinalLayer(width, 2 * config.token_dim)

    def forward(
        self, x_NP: Tensor, timestep_N: Tensor, condition_ND: Tensor, level_N: Tensor
    ) -> Tensor:
        level_N1 = level_N[:, None].to(self.index_cond_embed.weight.dtype)
        y_NW = self.time_embed(timestep_N) + _apply(self.cond_embed, condition_ND)
        y_NW = y_NW + self.index_cond_embed(level_N1)
        activated_NW = F.silu(y_NW)
        h_NW = _apply(self.input_proj, x_NP)
        for block in self.res_blocks:
            h_NW = block(h_NW, activated_NW)
        out: Tensor = self.final_layer(h_NW, activated_NW)
        return out

    @torch.no_grad()
    def init_weights(self) -> None:
        """Xavier for linear layers, small normal for the time MLP, zero for gates and output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(_linear(self.time_embed.mlp, 0).weight, std=0.02)
        nn.init.normal_(_linear(self.time_embed.mlp, 2).weight, std=0.02)
        for layer in [*self.res_blocks, self.final_layer]:
            nn.init.zeros_(layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)
