"""The training loss with every random draw handed in (FAR, arXiv 2503.05305; no dropout)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .diffusion import hybrid_loss, make_schedule, q_sample
from .filters import filter_mask_patchify, patchify
from .head import head_forward
from .sampling import HEAD_PREFIX
from .transformer import class_embedding, condition


def level_weight_sine(level_B: Tensor, num_levels: int, dtype: torch.dtype) -> Tensor:
    """w_i = 1 + sin(pi/2 * i/F), the paper's weight of level i."""
    return 1 + torch.sin(level_B.to(dtype) * (math.pi / 2 / num_levels))


def training_loss(
    params: Mapping[str, Tensor],
    latents_BCHW: Tensor,
    labels_B: Tensor,
    level_B: Tensor,
    timestep_N: Tensor,
    noise_NP: Tensor,
    mask_BL: Tensor | None,
    *,
    num_heads: int,
    patch_size: int = 1,
    num_levels: int = 16,
    kind: str = "area_bicubic",
    level_weight: str | None = None,
    num_timesteps: int = 1000,
) -> Tensor:
    """Scalar: the mean of `hybrid_loss` over ALL tokens, masked or not.

    Input of the transformer: low-pass(x, level), masked. Target of the head: the clean x at every
    token. labels_B: -1 = label dropped. level_B: raw level numbers. timestep_N, noise_NP: N = M * B
    * L rows, batch multiplier M outermost. level_weight: None (all 1) or "sine" (1 + sin(pi/2 i/F),
    multiplies the rows of an image). Raises ValueError for an unknown level_weight and for rows
    that are no multiple of B * L.
    """
    if level_weight not in (None, "sine"):
        raise ValueError(f"level_weight is {level_weight!r}: choose None or 'sine'")
    tokens_BLP = filter_mask_patchify(
        latents_BCHW, level_B, mask_BL, patch_size=patch_size, num_levels=num_levels, kind=kind
    )
    z_BLD = condition(
        params, tokens_BLP, mask_BL, class_embedding(params, labels_B), num_heads=num_heads
    )
    batch, length, _ = tokens_BLP.shape
    multiplier, rest = divmod(timestep_N.shape[0], batch * length)
    if rest or not multiplier:
        raise ValueError(
            f"{timestep_N.shape[0]} rows of draws: give a multiple of {batch} x {length} tokens"
        )

    target_NP = patchify(latents_BCHW, patch_size).flatten(0, 1).repeat(multiplier, 1)
    condition_ND = z_BLD.flatten(0, 1).repeat(multiplier, 1)
    level_N = level_B.repeat_interleave(length).repeat(multiplier)
    noised_NP = q_sample(target_NP, noise_NP, timestep_N, make_schedule(num_timesteps))
    head = {k.removeprefix(HEAD_PREFIX): v for k, v in params.items() if k.startswith(HEAD_PREFIX)}
    output_N2P = head_forward(head, noised_NP, timestep_N, condition_ND, level_N)
    loss_N = hybrid_loss(
        output_N2P, target_NP, noise_NP, noised_NP, timestep_N, num_timesteps=num_timesteps
    )
    if level_weight == "sine":
        loss_N = loss_N * level_weight_sine(level_N, num_levels, loss_N.dtype)
    return loss_N.mean()
