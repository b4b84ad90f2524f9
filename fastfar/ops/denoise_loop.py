"""All diffusion steps of one outer step, for all tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfar.diffusion import diffusion_tables, timestep_embedding
from fastfar.ops._registry import op
from fastfar.ops.adaln_mlp_block import adaln_mlp_block

EPS = 1e-6
# Rows are independent: blocks of this many keep their modulations in a CPU's cache.
CPU_ROW_BLOCK = 1024


def _block_names(head: Mapping[str, Tensor]) -> list[str]:
    depth = sum(name.endswith(".in_ln.weight") for name in head)
    return [f"res_blocks.{i}." for i in range(depth)]


def _check(condition_MD: Tensor, initial_NP: Tensor, noise_TNP: Tensor) -> None:
    rows = len(initial_NP)
    if len(condition_MD) not in (rows, 2 * rows):
        raise ValueError(
            f"condition has {len(condition_MD)} rows for {rows} tokens; give {rows}, or "
            f"{2 * rows} with the conditional rows first"
        )
    if noise_TNP.shape[1:] != initial_NP.shape:
        raise ValueError(
            f"noise must be (T, N, P) with (N, P) = {tuple(initial_NP.shape)} of the start noise, "
            f"got {tuple(noise_TNP.shape)}"
        )


@op
def denoise_loop(
    head: Mapping[str, Tensor],
    condition_MD: Tensor,
    level: float,
    initial_NP: Tensor,
    noise_TNP: Tensor,
    *,
    guidance_scale: float,
    temperature: float,
    x0_range: tuple[float, float] | None = None,
    num_timesteps: int = 1000,
) -> Tensor:
    """Ancestral sampling of x ~ p(x | z, level) from x_T = initial in T respaced steps.

    Each step: eps = eps_u + s (eps_c - eps_u); x_0 = recip x_t - recip_m1 eps, bounded to
    x0_range; x = mean_x0 x_0 + mean_xt x_t + temperature * exp(log var / 2) * noise, without
    noise at the last step. The variance channel is the conditional half's own.

    Exactly equal but cheaper than the published loop: everything that depends on (z, level) or on
    t alone is computed once; both halves share the input projection; the unconditional half's
    variance is never formed; no half at all where the scale is 1.

    Args:
        head: parameters of the denoising MLP by their published names (without `diffloss.net.`);
            their dtype is the compute dtype.
        condition_MD: (2 N, D), conditional rows first; or (N, D) for no guidance.
        level: number of the frequency level.
        initial_NP: (N, P) start noise.
        noise_TNP: (T, N, P) noise in the order used; its length is the number of steps.
        guidance_scale: s.
        temperature: factor on the noise.
        x0_range: (low, high), or None for the published, unbounded rule.

    Returns:
        (N, P), float32 (float64 for float64 noise).

    Raises:
        ValueError: condition or noise does not have the rows of `initial_NP`.

    Source: published code of FAR and MAR; improved DDPM, arXiv 2102.09672.
    """
    rows = len(initial_NP)
    _check(condition_MD, initial_NP, noise_TNP)
    guided = len(condition_MD) == 2 * rows and guidance_scale != 1.0
    condition = condition_MD if guided else condition_MD[:rows]
    block = CPU_ROW_BLOCK if initial_NP.device.type == "cpu" else max(rows, 1)
    halves_2ND = condition.view(-1, rows, condition.shape[-1])
    pieces = [
        _denoise_rows(
            head,
            halves_2ND[:, start : start + block].flatten(0, 1),
            level,
            initial_NP[start : start + block],
            noise_TNP[:, start : start + block],
            guidance_scale,
            temperature,
            x0_range,
            num_timesteps,
        )
        for start in range(0, rows, block)
    ]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _denoise_rows(
    head: Mapping[str, Tensor],
    condition: Tensor,
    level: float,
    initial_NP: Tensor,
    noise_TNP: Tensor,
    guidance_scale: float,
    temperature: float,
    x0_range: tuple[float, float] | None,
    num_timesteps: int,
) -> Tensor:
    """`denoise_loop` of one block of rows; guided if `condition` has two rows for each."""
    rows = len(initial_NP)
    guided = len(condition) == 2 * rows
    dtype = head["input_proj.weight"].dtype
    tables = diffusion_tables(len(noise_TNP), num_timesteps)
    blocks = _block_names(head)

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, head[name + ".weight"], head[name + ".bias"])

    # Hoisted: the condition of every row, the time embedding of every step, one modulation matrix.
    timesteps = tables.timestep.to(initial_NP.device)
    exact = torch.promote_types(dtype, torch.float32)
    features_TF = timestep_embedding(timesteps, dtype=exact).to(dtype)
    time_TW = linear("time_embed.mlp.0", features_TF)
    time_TW = linear("time_embed.mlp.2", F.silu(time_TW))
    level_11 = torch.full((1, 1), float(level), dtype=dtype, device=initial_NP.device)
    base_MW = linear("cond_embed", condition.to(dtype)) + linear("index_cond_embed", level_11)
    layers = [*blocks, "final_layer."]
    modulation_weight = torch.cat([head[f"{n}adaLN_modulation.1.weight"] for n in layers])
    modulation_bias = torch.cat([head[f"{n}adaLN_modulation.1.bias"] for n in layers])
    width = base_MW.shape[-1]
    numbers = initial_NP.shape[-1]

    state_dtype = torch.promote_types(initial_NP.dtype, torch.float32)
    x_NP = initial_NP.to(state_dtype)
    for i in range(len(tables)):
        t = len(tables) - 1 - i
        modulations = F.linear(F.silu(base_MW + time_TW[t]), modulation_weight, modulation_bias)
        parts = iter(modulations.view(len(modulations), -1, width).unbind(dim=1))
        h_MW = linear("input_proj", x_NP.to(dtype))
        if guided:
            h_MW = torch.cat([h_MW, h_MW])
        for name in blocks:
            h_MW = adaln_mlp_block(
                h_MW,
                next(parts),
                next(parts),
                next(parts),
                head[name + "in_ln.weight"],
                head[name + "in_ln.bias"],
                head[name + "mlp.0.weight"],
                head[name + "mlp.0.bias"],
                head[name + "mlp.2.weight"],
                head[name + "mlp.2.bias"],
                eps=EPS,
            )
        shift, scale = next(parts), next(parts)
        h_MW = F.layer_norm(h_MW, (width,), eps=EPS)
        h_MW = torch.addcmul(h_MW + shift, h_MW, scale)
        weight, bias = head["final_layer.linear.weight"], head["final_layer.linear.bias"]
        eps_NP, v_NP = F.linear(h_MW[:rows], weight, bias).to(state_dtype).chunk(2, dim=-1)
        if guided:
            free_NP = F.linear(h_MW[rows:], weight[:numbers], bias[:numbers]).to(state_dtype)
            eps_NP = free_NP + guidance_scale * (eps_NP - free_NP)

        x0_NP = float(tables.recip[t]) * x_NP - float(tables.recip_m1[t]) * eps_NP
        if x0_range is not None:
            x0_NP = x0_NP.clamp(*x0_range)
        x_NP = float(tables.mean_x0[t]) * x0_NP + float(tables.mean_xt[t]) * x_NP
        if t > 0:
            fraction = (v_NP + 1.0) / 2.0
            log_variance = fraction * float(tables.log_beta[t])
            log_variance = log_variance + (1.0 - fraction) * float(tables.log_posterior[t])
            noise_NP = noise_TNP[i].to(state_dtype)
            x_NP = x_NP + temperature * torch.exp(0.5 * log_variance) * noise_NP
    return x_NP
