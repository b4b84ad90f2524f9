"""The denoising MLP: eps and variance of one token given its condition.

The modules are drop-ins for those of MAR and FAR: names, constructor arguments, parameter names
and meaning are the published ones (in a checkpoint they lie under `diffloss.net`).

Source: MAR, arXiv 2406.11838, section 4.2; FAR adds the embedding of the frequency level.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfar.config import FARConfig
from fastfar.diffusion import timestep_embedding
from fastfar.ops import adaln_mlp_block, linear
from fastfar.ops._module import OpModule, checkpointed

EPS = 1e-6
TIME_FEATURES = 256


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


class TimestepEmbedder(nn.Module):
    """W_2 silu(W_1 sinusoid(t) + b_1) + b_2.

    Args:
        hidden_size: width of the result.
        frequency_embedding_size: number of sines and cosines.
    """

    def __init__(self, hidden_size: int, frequency_embedding_size: int = TIME_FEATURES) -> None:
        super().__init__()
        self.frequency_embedding_size = frequency_embedding_size
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
        )

    def forward(self, t: Tensor) -> Tensor:
        """t: (N,) timesteps, of any dtype. Returns (N, W) in the dtype of the parameters."""
        dtype = _linear(self.mlp, 0).weight.dtype
        exact = torch.promote_types(dtype, torch.float32)
        features = timestep_embedding(t, self.frequency_embedding_size, exact)
        h_NW = F.silu(_apply(_linear(self.mlp, 0), features.to(dtype)))
        return _apply(_linear(self.mlp, 2), h_NW)


class ResBlock(OpModule):
    """x + gate * MLP(LN(x) * (1 + scale) + shift), with (shift, scale, gate) = W silu(y) + b.

    MLP(h) = W_2 silu(W_1 h + b_1) + b_2; LN has an affine and eps 1e-6.

    Args:
        channels: W, width of x and of the condition y.
        backend: see `fastfar.nn`.
    """

    def __init__(self, channels: int, *, backend: str | None = "auto") -> None:
        super().__init__(backend)
        self.channels = channels
        self.in_ln = nn.LayerNorm(channels, eps=EPS)
        self.mlp = nn.Sequential(
            nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, channels)
        )
        self.adaLN_modulation = _modulation(channels, 3)

    def forward(self, x: Tensor, y: Tensor, activated: bool = False) -> Tensor:
        """x, y: (..., W). activated: y is silu(y) already, which a whole head computes once."""
        with self.on_backend(x):
            fc1, fc2 = _linear(self.mlp, 0), _linear(self.mlp, 2)
            activated_NW = _rows(y if activated else F.silu(y))
            modulation = _apply(_linear(self.adaLN_modulation, 1), activated_NW)
            shift_NW, scale_NW, gate_NW = modulation.chunk(3, dim=-1)
            out_NW = adaln_mlp_block(
                _rows(x),
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
        return out_NW.reshape(x.shape)


class FinalLayer(OpModule):
    """W_f (LN(x) * (1 + scale) + shift) + b_f, with (shift, scale) = W silu(c) + b.

    LN has no affine, and eps 1e-6.

    Args:
        model_channels: W, width of x and of the condition c.
        out_channels: numbers per row of the result.
        backend: see `fastfar.nn`.
    """

    def __init__(
        self, model_channels: int, out_channels: int, *, backend: str | None = "auto"
    ) -> None:
        super().__init__(backend)
        self.linear = nn.Linear(model_channels, out_channels)
        self.adaLN_modulation = _modulation(model_channels, 2)

    def forward(self, x: Tensor, c: Tensor, activated: bool = False) -> Tensor:
        """x, c: (..., W). activated: c is silu(c) already. Returns (..., out_channels)."""
        with self.on_backend(x):
            modulation = _apply(_linear(self.adaLN_modulation, 1), c if activated else F.silu(c))
            shift_NW, scale_NW = modulation.chunk(2, dim=-1)
            h_NW = F.layer_norm(x, (x.shape[-1],), eps=EPS)
            return _apply(self.linear, h_NW * (1 + scale_NW) + shift_NW)


def _rows(x: Tensor) -> Tensor:
    """(..., W) -> (N, W)."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


class SimpleMLPAdaLN(OpModule):
    """Maps (x_t, t, z, level) of every row to eps and the variance channel.

    y = time_embed(t) + cond_embed(c) + index_cond_embed(index), then `num_res_blocks` ResBlocks
    and a FinalLayer, all modulated by y.

    Args:
        in_channels: P, numbers per token.
        model_channels: W.
        out_channels: numbers per row of the result; 2 P for eps and variance.
        z_channels: D, width of the condition.
        num_res_blocks: depth.
        grad_checkpointing: compute each block again in the backward instead of keeping what it
            needs: less memory, same gradients.
        level_input: FAR's head, which is told the frequency level; False is MAR's, without it.
        backend: see `fastfar.nn`.
    """

    def __init__(
        self,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        z_channels: int,
        num_res_blocks: int,
        grad_checkpointing: bool = False,
        *,
        level_input: bool = True,
        backend: str | None = "auto",
    ) -> None:
        super().__init__(backend)
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.out_channels = out_channels
        self.num_res_blocks = num_res_blocks
        self.grad_checkpointing = grad_checkpointing
        self.time_embed = TimestepEmbedder(model_channels)
        self.cond_embed = nn.Linear(z_channels, model_channels)
        self.index_cond_embed = nn.Linear(1, model_channels) if level_input else None
        self.input_proj = nn.Linear(in_channels, model_channels)
        # The layers follow the head's back end.
        self.res_blocks = nn.ModuleList(
            ResBlock(model_channels, backend=None) for _ in range(num_res_blocks)
        )
        self.final_layer = FinalLayer(model_channels, out_channels, backend=None)
        if not self.input_proj.weight.is_meta:
            self.initialize_weights()

    def forward(self, x: Tensor, t: Tensor, c: Tensor, index: Tensor | None = None) -> Tensor:
        """eps and variance of every row.

        Args:
            x: (N, P) noised tokens.
            t: (N,) diffusion times.
            c: (N, D) conditions, the transformer's output.
            index: (N,) or (N, 1) frequency levels as numbers, of any dtype; None adds nothing.

        Returns:
            (N, out_channels).

        Raises:
            ValueError: an index, but no level input; or not one level per row.
        """
        with self.on_backend(x):
            y_NW = self.time_embed(t) + _apply(self.cond_embed, c)
            if index is not None:
                y_NW = y_NW + self._level_embedding(index, len(x))
            activated_NW = F.silu(y_NW)
            h_NW = _apply(self.input_proj, x)
            for block in self.res_blocks:
                if self.grad_checkpointing and torch.is_grad_enabled():
                    h_NW = checkpointed(block, h_NW, activated_NW, True)
                else:
                    h_NW = block(h_NW, activated_NW, True)
            out: Tensor = self.final_layer(h_NW, activated_NW, True)
            return out

    def forward_with_cfg(
        self, x: Tensor, t: Tensor, c: Tensor, cfg_scale: float, index: Tensor | None = None
    ) -> Tensor:
        """`forward` of two halves, conditional rows first, with eps = eps_u + s (eps_c - eps_u).

        Both halves see the x of the first, and get the same eps; the variance stays each half's.
        """
        half_NP = x[: len(x) // 2]
        out = self.forward(torch.cat([half_NP, half_NP]), t, c, index)
        eps, rest = out[:, : self.in_channels], out[:, self.in_channels :]
        conditional, unconditional = eps.chunk(2)
        mixed = unconditional + cfg_scale * (conditional - unconditional)
        return torch.cat([torch.cat([mixed, mixed]), rest], dim=1)

    def _level_embedding(self, index: Tensor, rows: int) -> Tensor:
        if self.index_cond_embed is None:
            raise ValueError(
                "this head has no level input, but got an index; build it with level_input=True"
            )
        if index.numel() != rows:
            shape = tuple(index.shape)
            raise ValueError(f"index must hold a level for each of {rows} rows, got shape {shape}")
        embedding: Tensor = self.index_cond_embed(
            index.reshape(rows, 1).to(self.index_cond_embed.weight.dtype)
        )
        return embedding

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Xavier for linear layers, normal(0.02) for the time MLP, zero for gates and output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(_linear(self.time_embed.mlp, 0).weight, std=0.02)
        nn.init.normal_(_linear(self.time_embed.mlp, 2).weight, std=0.02)
        for layer in [*self.res_blocks, self.final_layer]:
            nn.init.zeros_(layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)


class DenoisingMLP(SimpleMLPAdaLN):
    """The head of a FAR model of these sizes, on the back end that its caller chooses."""

    def __init__(self, config: FARConfig) -> None:
        super().__init__(
            config.token_dim,
            config.head_width,
            2 * config.token_dim,
            config.width,
            config.head_depth,
            backend=None,
        )
