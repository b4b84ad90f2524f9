"""Cases of what is done with latents: the spectral filter, noising, the loss."""

from __future__ import annotations

import torch

from fastfar import FARConfig, reference
from fastfar.bench.cases._case import Arguments, Case


def _filter_mask_patchify(config: FARConfig, batch: int, dtype: torch.dtype) -> Arguments:
    size = config.latent_size
    latent = torch.randn(batch, config.latent_channels, size, size).to(dtype)
    level = torch.arange(batch) % (config.num_levels - 1) + 1
    mask = torch.rand(batch, config.num_tokens) < 0.5
    kwargs = {
        "patch_size": config.patch_size,
        "num_levels": config.num_levels,
        "kind": config.filter,
    }
    return (latent, level, mask), kwargs


def _hybrid_loss(config: FARConfig, batch: int, dtype: torch.dtype) -> Arguments:
    rows, numbers = 4 * batch * config.num_tokens, config.token_dim  # batch multiplier 4
    timestep = torch.randint(config.num_timesteps, (rows,))
    target, noise = torch.randn(2, rows, numbers)
    schedule = reference.make_schedule(config.num_timesteps)
    noised = reference.q_sample(target, noise, timestep, schedule)
    output = torch.randn(rows, 2 * numbers)
    tensors = (x.to(dtype) for x in (output, target, noise, noised))
    return (*tensors, timestep), {"num_timesteps": config.num_timesteps}


def _add_noise(config: FARConfig, batch: int, dtype: torch.dtype) -> Arguments:
    tokens, numbers = batch * config.num_tokens, config.token_dim
    x0, noise = torch.randn(tokens, numbers), torch.randn(4 * tokens, numbers)
    timestep = torch.randint(config.num_timesteps, (4 * tokens,))
    return (x0.to(dtype), noise.to(dtype), timestep), {"num_timesteps": config.num_timesteps}


CASES = (
    Case(
        "filter_mask_patchify",
        _filter_mask_patchify,
        lambda c, batch: 4 * batch * c.latent_channels * c.latent_size**3,
    ),
    Case("hybrid_loss", _hybrid_loss, lambda c, batch: 0),
    Case("add_noise", _add_noise, lambda c, batch: 0),
)
