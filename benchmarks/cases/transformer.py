"""Cases of the encoder and decoder blocks. 2 B images: both halves of guidance."""

from __future__ import annotations

import torch

from fastfar import FARConfig
from fastfar.bench.cases._case import Arguments, Case, matrix, positions, vector


def _attention(config: FARConfig, batch: int, dtype: torch.dtype) -> Arguments:
    heads, length = config.num_heads, positions(config)
    qkv = torch.randn(2 * batch, length, 3, heads, config.width // heads)
    return (qkv.to(dtype),), {}


def _layernorm_attention_residual(config: FARConfig, batch: int, dtype: torch.dtype) -> Arguments:
    width = config.width
    args = (
        torch.randn(2 * batch, positions(config), width).to(dtype),
        vector(width, dtype, mean=1.0),
        vector(width, dtype),
        matrix(3 * width, width, dtype),
        vector(3 * width, dtype),
        matrix(width, width, dtype),
        vector(width, dtype),
    )
    return args, {"num_heads": config.num_heads}


def _layernorm_linear(config: FARConfig, batch: int, dtype: torch.dtype) -> Arguments:
    width = config.width
    args = (
        torch.randn(2 * batch, positions(config), width).to(dtype),
        vector(width, dtype, mean=1.0),
        vector(width, dtype),
        matrix(width, width, dtype),
        vector(width, dtype),
    )
    return args, {}


def _layernorm_mlp_residual(config: FARConfig, batch: int, dtype: torch.dtype) -> Arguments:
    width, hidden = config.width, config.mlp_ratio * config.width
    args = (
        torch.randn(2 * batch, positions(config), width).to(dtype),
        vector(width, dtype, mean=1.0),
        vector(width, dtype),
        matrix(hidden, width, dtype),
        vector(hidden, dtype),
        matrix(width, hidden, dtype),
        vector(width, dtype),
    )
    return args, {}


def _residual_layernorm(config: FARConfig, batch: int, dtype: torch.dtype) -> Arguments:
    width, rows = config.width, 2 * batch * positions(config)
    x_ND, update_ND = torch.randn(2, rows, width).to(dtype)
    return (x_ND, update_ND, vector(width, dtype, mean=1.0), vector(width, dtype)), {}


def _transformer_block(config: FARConfig, batch: int, dtype: torch.dtype) -> Arguments:
    first, kwargs = _layernorm_attention_residual(config, batch, dtype)
    (_, *second), _ = _layernorm_mlp_residual(config, batch, dtype)
    return (*first, *second), kwargs


def _rows(config: FARConfig, batch: int) -> int:
    return 2 * batch * positions(config)


def _scores(config: FARConfig) -> int:
    """FLOPs of scores and mixing per position."""
    return 4 * positions(config) * config.width


CASES = (
    Case("attention", _attention, lambda c, batch: _rows(c, batch) * _scores(c)),
    Case(
        "layernorm_attention_residual",
        _layernorm_attention_residual,
        lambda c, batch: _rows(c, batch) * (8 * c.width**2 + _scores(c)),
    ),
    Case(
        "layernorm_linear",
        _layernorm_linear,
        lambda c, batch: _rows(c, batch) * 2 * c.width**2,
    ),
    Case(
        "layernorm_mlp_residual",
        _layernorm_mlp_residual,
        lambda c, batch: _rows(c, batch) * 4 * c.mlp_ratio * c.width**2,
    ),
    Case("residual_layernorm", _residual_layernorm, lambda c, batch: 0),
    Case(
        "transformer_block",
        _transformer_block,
        lambda c, batch: (
            _rows(c, batch) * ((8 + 4 * c.mlp_ratio) * c.width**2 + _scores(c))
        ),
    ),
)
