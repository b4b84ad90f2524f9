"""How well the head predicts the noise where sampling depends on it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfar.levels import patchify
from fastfar.model import FAR
from fastfar.ops import add_noise, filter_mask_patchify

PROBE_TIMESTEPS = (999, 990, 900, 500, 50)


@torch.no_grad()
def eps_errors(
    model: FAR, latents_BCHH: Tensor, labels_B: Tensor, level: int = 8
) -> dict[str, float]:
    """Root mean square error of eps at fixed timesteps and one level, with fixed noise.

    The values near t = 999 decide whether unbounded sampling diverges: sigma / alpha is 20,300
    there, so an error of 0.01 in eps is one of 200 in x_0.
    """
    config, device = model.config, latents_BCHH.device
    generator = torch.Generator().manual_seed(0)
    level = min(level, config.num_levels)
    tokens = filter_mask_patchify(
        latents_BCHH,
        torch.full((len(latents_BCHH),), level, device=device),
        patch_size=config.patch_size,
        num_levels=config.num_levels,
        kind=config.filter,
    )
    z_ND = model(tokens, model.class_embedding(labels_B)).flatten(0, 1)
    target_NP = patchify(latents_BCHH, config.patch_size).flatten(0, 1)
    rows = target_NP.shape[:1]
    noise_NP = torch.randn(target_NP.shape, generator=generator).to(device)
    level_N = torch.full(rows, float(level), device=device)
    errors = {}
    for t in PROBE_TIMESTEPS:
        timestep_N = torch.full(rows, min(t, config.num_timesteps - 1), device=device)
        noised_NP = add_noise(target_NP, noise_NP, timestep_N, num_timesteps=config.num_timesteps)
        output = model.head(noised_NP, timestep_N, z_ND, level_N)
        eps_NP = output[:, : config.token_dim]
        errors[f"eps_rmse_t{t}"] = float((eps_NP - noise_NP).square().mean().sqrt())
    return errors
