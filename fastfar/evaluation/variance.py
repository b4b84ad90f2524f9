"""Variance tables of the ancestral sampler, measured on data.

Legend: B image, L token, P number of a token, N = B L, T diffusion step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import MutableMapping

import torch
from torch import Tensor

from fastfar._coefficients import MAX_FRACTION
from fastfar.diffusion import cosine_alpha_bar
from fastfar.levels import patchify
from fastfar.model import FAR
from fastfar.noise import SeededNoise
from fastfar.ops import denoise_loop
from fastfar.outer_step import Inputs, OuterStep
from fastfar.plan import SamplingPlan
from fastfar.sampling import check_labels, outer_steps
from fastfar.solver import Solver, schedule

Fractions = MutableMapping[tuple[int, int], tuple[float, ...]]


def optimal_variance(
    model: FAR,
    latents_BCHH: Tensor,
    class_labels: Tensor,
    plan: SamplingPlan,
    *,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
    seed: int = 0,
    known: Fractions | None = None,
) -> SamplingPlan:
    """`plan` with the variances that its ancestral steps should have, measured on real latents.

    The best variance of a Gaussian reverse step is beta_tilde + f (beta - beta_tilde) with
    f = V / s_t^2 and V = E (x_0 - E[x_0 | x_t, z])^2: the ordinary loss of the model, by outer
    step, timestep and number of a token. It is taken from the conditional half, as the published
    sampler's is.

    Args:
        model: a FAR model.
        latents_BCHH: clean latents that it was not trained on; a few hundred.
        class_labels: (B,).
        plan: levels, masks, timesteps. Steps with another method than "ddpm" stay as they are.
        backend, dtype: see `fastfar.sample_latents`.
        seed: of masks and noise.
        known: fractions by (outer step, timestep) measured before on the same latents and levels:
            read instead of measured, and added to.

    Returns:
        The plan with `Solver(variance="table", variance_table=...)` at its ancestral steps.

    Raises:
        ValueError: latents or labels that do not fit the model, or a plan beyond its levels.

    Source: Analytic-DPM, arXiv 2201.06503, for the optimal variance.
    """
    config = model.config
    shape = (config.latent_channels, config.latent_size, config.latent_size)
    labels_B = check_labels(class_labels, config.num_classes)
    if len(latents_BCHH) != len(labels_B) or tuple(latents_BCHH.shape[1:]) != shape:
        raise ValueError(
            f"latents are {tuple(latents_BCHH.shape)} for {len(labels_B)} labels: this model takes "
            f"(B, {', '.join(map(str, shape))}) and one label each"
        )
    plan.check_fits(config.num_levels)
    known = {} if known is None else known
    solvers = list(plan.solvers)
    with outer_steps(model, plan.with_changes(guidance_scale=1.0), backend, dtype) as step:
        inputs = forced_inputs(step, labels_B, seed)
        for k, solver in enumerate(plan.solvers):
            if solver.method != "ddpm":
                continue
            plain = dataclasses.replace(solver, variance="log", variance_table=None)
            timesteps = schedule(plain, plan.diffusion_steps[k], config.num_timesteps).timesteps
            if missing := [t for t in timesteps if (k, t) not in known]:
                z_ND = step.condition(k, inputs, latents_BCHH).flatten(0, 1)
                x0_NP = patchify(latents_BCHH, config.patch_size).flatten(0, 1)
                for t in missing:
                    known[k, t] = fraction(step, k, z_ND, x0_NP, t, seed)
            table = tuple(known[k, t] for t in timesteps)
            solvers[k] = dataclasses.replace(solver, variance="table", variance_table=table)
    return plan.with_changes(solvers=tuple(solvers))


def forced_inputs(step: OuterStep, labels_B: Tensor, seed: int) -> Inputs:
    """What outer steps read where their input is given: labels, and one random order per image."""
    config = step.model.config
    keys = [(seed, image) for image in range(len(labels_B))]
    order_BL = None
    if step.plan.mask_ratios is not None:
        order_BL = SeededNoise(keys, config.num_tokens, config.token_dim).order()
    return Inputs.of(labels_B, order_BL)


def fraction(
    step: OuterStep, k: int, condition_MD: Tensor, x0_NP: Tensor, timestep: int, seed: int
) -> tuple[float, ...]:
    """f = E (x_0 - E[x_0 | x_t])^2 / s_t^2 of every number, in 0..1.2; see `optimal_variance`."""
    error_P = (x0_NP - predicted_x0(step, k, condition_MD, x0_NP, timestep, seed)).square().mean(0)
    sigma2 = 1.0 - float(cosine_alpha_bar(step.model.config.num_timesteps)[timestep])
    return tuple((error_P.double() / sigma2).clamp(max=MAX_FRACTION).tolist())


def predicted_x0(
    step: OuterStep, k: int, condition_MD: Tensor, x0_NP: Tensor, timestep: int, seed: int
) -> Tensor:
    """(N, P): E[x_0 | x_t, z] of the head at x_t = a x_0 + s n, guided as the plan says."""
    config, plan = step.model.config, step.plan
    alpha_bar = float(cosine_alpha_bar(config.num_timesteps)[timestep])
    generator = torch.Generator().manual_seed(1000 * seed + timestep)
    noise_NP = torch.randn(x0_NP.shape, generator=generator)
    x_NP = alpha_bar**0.5 * x0_NP.float() + (1.0 - alpha_bar) ** 0.5 * noise_NP
    # The last step of a run ends in the predicted x_0: here it is the only one.
    result: Tensor = denoise_loop(
        step.head,
        condition_MD,
        plan.levels[k],
        x_NP,
        noise_NP[None],
        guidance_scale=plan.guidance_scales[k],
        temperature=1.0,
        x0_range=plan.x0_range,
        num_timesteps=config.num_timesteps,
        solver=Solver(timesteps=(timestep,)),
    )
    return result
