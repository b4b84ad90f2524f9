"""Cases of KL-16's decoder at its lowest resolution, where a third of its layers are."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfar import FARConfig
from fastfar.bench.cases._case import Arguments, Case, matrix, vector

WIDTH, GROUPS = 512, 32


def _image(config: FARConfig, batch: int, dtype: torch.dtype) -> Tensor:
    x_BCHW = torch.randn(batch, WIDTH, config.latent_size, config.latent_size)
    return x_BCHW.to(dtype, memory_format=torch.channels_last)


def _weights(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight = matrix(WIDTH, WIDTH * 9, dtype).view(WIDTH, WIDTH, 3, 3)
    return weight.contiguous(memory_format=torch.channels_last), vector(WIDTH, dtype)


def _groupnorm_silu(config: FARConfig, batch: int, dtype: torch.dtype) -> Arguments:
    vectors = vector(WIDTH, dtype, mean=1.0), vector(WIDTH, dtype)
    return (_image(config, batch, dtype), *vectors), {"groups": GROUPS}


def _convolution_residual(config: FARConfig, batch: int, dtype: torch.dtype) -> Arguments:
    x, residual = _image(config, batch, dtype), _image(config, batch, dtype)
    return (x, *_weights(dtype), residual), {}


def _upsample_convolution(config: FARConfig, batch: int, dtype: torch.dtype) -> Arguments:
    return (_image(config, batch, dtype), *_weights(dtype)), {}


def _products(config: FARConfig, batch: int, taps: int) -> int:
    return 2 * batch * config.latent_size**2 * taps * WIDTH**2


CASES = (
    Case("groupnorm_silu", _groupnorm_silu, lambda c, batch: 0),
    Case("convolution_residual", _convolution_residual, lambda c, batch: _products(c, batch, 9)),
    Case(
        "upsample_convolution",
        _upsample_convolution,
        lambda c, batch: _products(c, batch, 4 * 9),
        # Packed, the taps that read the same pixel are added up beforehand: 2 x 2 are left.
        lambda c, batch, path: _products(c, batch, 4 * (4 if path == "native" else 9)),
    ),
)
