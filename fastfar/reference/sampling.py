"""The outer loop of sampling: one pass of the transformer and one denoising per frequency level."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .filters import NOT_FILTERED, filter_mask_patchify, unpatchify
from .solvers import Moments, Solver, denoise_loop
from .transformer import class_embedding, condition

HEAD_PREFIX = "diffloss.net."
# (z_c, z_u, level, guidance scale) -> moments of the tokens
MomentHead = Callable[[Tensor, Tensor, int, float], Moments]


class Plan(Protocol):
    """What `sample_latents` reads of a plan; entry k of each sequence belongs to outer step k."""

    @property
    def levels(self) -> Sequence[int]: ...
    @property
    def input_levels(self) -> Sequence[int | None]: ...
    @property
    def guidance_scales(self) -> Sequence[float]: ...
    @property
    def temperatures(self) -> Sequence[float]: ...
    @property
    def diffusion_steps(self) -> Sequence[int]: ...
    @property
    def mask_ratios(self) -> Sequence[float] | None: ...
    @property
    def solvers(self) -> Sequence[Solver | None]: ...
    @property
    def x0_range(self) -> tuple[float, float] | None: ...


class Noise(Protocol):
    """What `sample_latents` reads of a noise source, N = B * L rows."""

    def initial(self, step: int) -> Tensor: ...
    def steps(self, step: int, count: int) -> Tensor: ...
    def order(self) -> Tensor: ...


def next_mask(order_BL: Tensor, ratio: float) -> Tensor:
    """bool (B, L): the first floor(L * ratio) tokens of each image's order are masked."""
    length = order_BL.shape[1]
    count = math.floor(length * ratio)
    mask_BL = torch.zeros_like(order_BL, dtype=torch.bool)
    return mask_BL.scatter(1, order_BL[:, :count], True)


def sample_latents(
    params: Mapping[str, Tensor],
    class_labels_B: Tensor,
    plan: Plan,
    noise: Noise,
    *,
    num_heads: int,
    latent_size: int,
    patch_size: int = 1,
    num_levels: int = 16,
    kind: str = "area_bicubic",
    num_timesteps: int = 1000,
    on_level: Callable[[int, Tensor], object] | None = None,
    moments: MomentHead | None = None,
) -> Tensor:
    """Latents (B, C, latent_size, latent_size) from coarse to fine, as the published code samples.

    At outer step k: z = transformer(masked tokens); x = denoise_loop(z, levels[k]); then x is
    low-passed to input_levels[k + 1] (None = not filtered) and masked by mask_ratios[k + 1] for the
    next step. Both guidance halves always run. The dtype is that of `params`. on_level(k, latent)
    is called after each step. moments is asked where a solver needs it; method "moments" is
    x = m + temperature U sqrt(C) n with the start noise n, bounded to x0_range.
    """
    head = {k.removeprefix(HEAD_PREFIX): v for k, v in params.items() if k.startswith(HEAD_PREFIX)}
    projection = params["z_proj.weight"]
    batch, token_dim = len(class_labels_B), projection.shape[1]
    num_tokens = (latent_size // patch_size) ** 2
    order_BL = None if plan.mask_ratios is None else noise.order().to(projection.device)
    with torch.no_grad():
        labels_2B = torch.cat([class_labels_B, torch.full_like(class_labels_B, -1)])
        class_2BD = class_embedding(params, labels_2B)
        tokens_BLP = projection.new_zeros(batch, num_tokens, token_dim)
        latent_BCHW = unpatchify(tokens_BLP, patch_size, latent_size)
        for step, level in enumerate(plan.levels):
            mask_BL = None
            if plan.mask_ratios is not None and order_BL is not None:
                mask_BL = next_mask(order_BL, plan.mask_ratios[step])
            if step > 0:
                input_level = plan.input_levels[step]
                level_B = torch.full_like(
                    class_labels_B, NOT_FILTERED if input_level is None else input_level
                )
                tokens_BLP = filter_mask_patchify(
                    latent_BCHW,
                    level_B,
                    mask_BL,
                    patch_size=patch_size,
                    num_levels=num_levels,
                    kind=kind,
                )
            mask_2BL = None if mask_BL is None else mask_BL.repeat(2, 1)
            z_2BLD = condition(
                params, tokens_BLP.repeat(2, 1, 1), mask_2BL, class_2BD, num_heads=num_heads
            )
            z_MD = z_2BLD.flatten(0, 1)
            scale, solver = plan.guidance_scales[step], plan.solvers[step]
            initial_NP, predicted = noise.initial(step).to(projection), None
            if moments is not None:
                z_c_ND, z_u_ND = z_MD.chunk(2)
                predicted = moments(z_c_ND, z_c_ND if scale == 1.0 else z_u_ND, level, scale)
            drawn = solver is not None and solver.method == "moments"
            if drawn and predicted is not None:
                x_NP = _drawn(predicted, initial_NP, plan.temperatures[step], plan.x0_range)
            else:
                x_NP = denoise_loop(
                    head,
                    z_MD,
                    level,
                    initial_NP,
                    noise.steps(step, plan.diffusion_steps[step]).to(projection),
                    guidance_scale=scale,
                    temperature=plan.temperatures[step],
                    x0_range=plan.x0_range,
                    num_timesteps=num_timesteps,
                    solver=solver,
                    moments=predicted,
                )
            x_BLP = x_NP.reshape(batch, num_tokens, token_dim)
            latent_BCHW = unpatchify(x_BLP, patch_size, latent_size)
            if on_level is not None:
                on_level(step, latent_BCHW)
    return latent_BCHW


def _drawn(
    moments: Moments, noise_NP: Tensor, temperature: float, x0_range: tuple[float, float] | None
) -> Tensor:
    root_NPP = moments.basis_PP @ moments.variance_NP.sqrt().diag_embed()
    x_NP = moments.mean_NP + temperature * (root_NPP @ noise_NP[..., None])[..., 0]
    return x_NP if x0_range is None else x_NP.clamp(*x0_range)
