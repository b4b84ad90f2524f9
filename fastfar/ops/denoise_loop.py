"""All diffusion steps of one outer step, for all tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfar import _native
from fastfar.diffusion import device_timesteps, timestep_embedding
from fastfar.ops._denoise_triton import denoise
from fastfar.ops._folded_head import FoldedHead
from fastfar.ops._head import PackedHead, pack_head
from fastfar.ops._launch import check, compute_dtype, launch, needs_pytorch
from fastfar.ops._registry import op
from fastfar.ops.adaln_mlp_block import adaln_mlp_block
from fastfar.solver import PUBLISHED, Moments, Schedule, Solver, schedule, shaped

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
    solver: Solver = PUBLISHED,
    moments: Moments | None = None,
) -> Tensor:
    """Sample x ~ p(x | z, level) from x_T = initial in T steps of a diffusion solver.

    Each step: eps = eps_u + s (eps_c - eps_u); x_0 = (x - sigma_t eps) / alpha_t, bounded to
    x0_range; x = A x + B x_0 + C x_0_previous + S noise, without noise at the last step. Where S
    is learned, it comes from the variance channel of the conditional half. The published solver is
    ancestral: C = 0; `fastfar.solver` has the coefficients of all of them.

    Exactly equal but cheaper than the published loop: everything that depends on (z, level) or on
    t alone is computed once; both halves share the input projection; the unconditional half's
    variance is never formed; no half at all where the scale is 1, or outside the solver's
    guidance range.

    Args:
        head: parameters of the denoising MLP by their published names (without `diffloss.net.`);
            their dtype is the compute dtype. On the native back end also a `PackedHead`.
        condition_MD: (2 N, D), conditional rows first; or (N, D) for no guidance.
        level: number of the frequency level.
        initial_NP: (N, P) start noise.
        noise_TNP: (T, N, P) noise in the order used; its length is the number of steps.
        guidance_scale: s.
        temperature: factor on the noise; `fastfar.solver` says on which.
        x0_range: (low, high), or None for the published, unbounded rule.
        solver: timesteps and coefficients.
        moments: of every token, for a solver that starts from them or takes its variance from them.

    Returns:
        (N, P), float32 (float64 for float64 noise).

    Raises:
        ValueError: condition or noise does not have the rows of `initial_NP`, or the solver does
            not take T steps, or needs moments that are not given.

    Source: published code of FAR and MAR; improved DDPM, arXiv 2102.09672.
    """
    rows = len(initial_NP)
    _check(condition_MD, initial_NP, noise_TNP)
    guided = len(condition_MD) == 2 * rows and guidance_scale != 1.0
    condition = condition_MD if guided else condition_MD[:rows]
    steps = schedule(solver, len(noise_TNP), num_timesteps, temperature)
    initial_NP, noise_TNP = shaped(solver, steps, initial_NP, noise_TNP, temperature, moments)
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
            x0_range,
            steps,
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
    x0_range: tuple[float, float] | None,
    steps: Schedule,
) -> Tensor:
    """`denoise_loop` of one block of rows; guided if `condition` has two rows for each."""
    rows = len(initial_NP)
    dtype = head["input_proj.weight"].dtype
    blocks = _block_names(head)

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, head[name + ".weight"], head[name + ".bias"])

    # Hoisted: the condition of every row, the time embedding of every step, one modulation matrix.
    exact = torch.promote_types(dtype, torch.float32)
    timestep_T = device_timesteps(steps.timesteps, initial_NP.device, exact)
    features_TF = timestep_embedding(timestep_T, dtype=exact).to(dtype)
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
    x0_previous_NP = torch.zeros_like(x_NP)
    with_guidance = [segment.guided for segment in steps.segments for _ in range(*segment[:2])]
    for i, (now, noise_NP) in enumerate(zip(steps.numbers, noise_TNP, strict=True)):
        guided = len(condition) == 2 * rows and with_guidance[i]
        y_MW = base_MW if guided else base_MW[:rows]
        modulations = F.linear(F.silu(y_MW + time_TW[i]), modulation_weight, modulation_bias)
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

        x0_NP = now["x0_from_x"] * x_NP - now["x0_from_eps"] * eps_NP
        if x0_range is not None:
            x0_NP = x0_NP.clamp(*x0_range)
        x_NP = now["x0"] * x0_NP + now["x"] * x_NP
        if now["x0_previous"] != 0.0:
            x_NP = x_NP + now["x0_previous"] * x0_previous_NP
        if now["noise"] != 0.0:
            deviation_NP = _deviation(v_NP, now)
            x_NP = x_NP + now["noise"] * deviation_NP * noise_NP.to(state_dtype)
        x0_previous_NP = x0_NP
    return x_NP


def _deviation(v_NP: Tensor, now: Mapping[str, float]) -> Tensor:
    """S without its factor, from the network's variance channel."""
    fraction_NP = ((v_NP + 1.0) / 2.0).clamp(now["fraction_min"], now["fraction_max"])
    mixed_NP = fraction_NP * now["high"] + (1.0 - fraction_NP) * now["low"]
    return mixed_NP.clamp(min=0.0).sqrt() if now["linear"] else torch.exp(0.5 * mixed_NP)


# Tokens that one thread takes through all steps at a time, at most: with more of them a weight is
# read less often, with fewer their activations stay in the L2 cache.
NATIVE_TASK = 128
# Rows (of tokens and halves) below which a thread computes the modulations of several diffusion
# steps at once, up to this many rows: the weights are then read once for all of them.
NATIVE_ROWS_AHEAD = 128


def _denoise_loop_native(
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
    solver: Solver = PUBLISHED,
    moments: Moments | None = None,
) -> Tensor:
    """`denoise_loop` by kernels/cpu/denoise_loop.cc; the state is float32."""
    rows = len(initial_NP)
    _check(condition_MD, initial_NP, noise_TNP)
    inputs = {"condition_MD": condition_MD, "initial_NP": initial_NP, "noise_TNP": noise_TNP}
    check("denoise_loop", inputs)
    if needs_pytorch({**inputs, **head}):
        result: Tensor = denoise_loop.implementations["torch"](
            head,
            condition_MD,
            level,
            initial_NP,
            noise_TNP,
            guidance_scale=guidance_scale,
            temperature=temperature,
            x0_range=x0_range,
            num_timesteps=num_timesteps,
            solver=solver,
            moments=moments,
        )
        return result
    if not isinstance(head, PackedHead):
        check("denoise_loop", head)
        head = pack_head(head, compute_dtype("denoise_loop", *head.values()))
    if condition_MD.shape[1] != head.condition_width or initial_NP.shape[1] != head.channels:
        raise ValueError(
            f"native denoise_loop: the head takes conditions of {head.condition_width} and tokens "
            f"of {head.channels} numbers, got {condition_MD.shape[1]} and {initial_NP.shape[1]}"
        )
    if rows == 0:
        return initial_NP.float()
    steps = schedule(solver, len(noise_TNP), num_timesteps, temperature)
    initial_NP, noise_TNP = shaped(solver, steps, initial_NP, noise_TNP, temperature, moments)
    condition_MD, x_NP = condition_MD.float().contiguous(), initial_NP.float().contiguous()
    noise_TNP = noise_TNP.float().contiguous()
    low, high = (-math.inf, math.inf) if x0_range is None else x0_range
    threads = torch.get_num_threads()
    task = _rows_per_task(rows, threads)
    time_TW, table = head.time_embedding(steps.timesteps), steps.table.float()
    for first, last, in_range in steps.segments:
        guided = in_range and len(condition_MD) == 2 * rows and guidance_scale != 1.0
        halves = 2 if guided else 1
        out_NP = torch.empty(initial_NP.shape)
        launch(
            "denoise_loop",
            dtype=_native.DTYPES[head.compute_dtype],
            threads=threads,
            rows=rows,
            halves=halves,
            width=head.width,
            depth=head.depth,
            channels=head.channels,
            condition_width=head.condition_width,
            steps=last - first,
            rows_per_task=task,
            steps_ahead=min(last - first, max(1, NATIVE_ROWS_AHEAD // (halves * task))),
            weights=head["weights"],
            vectors=head["vectors"],
            condition_MD=condition_MD,
            time_TW=time_TW[first:last],
            table=table[first:last],
            initial_NP=x_NP,
            noise_TNP=noise_TNP[first:last],
            level=float(level),
            guidance_scale=guidance_scale,
            x0_low=low,
            x0_high=high,
            out_NP=out_NP,
        )
        x_NP = out_NP
    return x_NP


def _rows_per_task(rows: int, threads: int) -> int:
    """Equal shares of at most `NATIVE_TASK` tokens, a multiple of `threads` shares if possible."""
    shares = -(-rows // NATIVE_TASK)
    shares = -(-shares // threads) * threads
    return -(-rows // min(shares, rows))


# --- Triton ----------------------------------------------------------------------------------


def _denoise_loop_triton(
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
    solver: Solver = PUBLISHED,
    moments: Moments | None = None,
) -> Tensor:
    """`denoise_loop` by Triton's kernels; the state is float32."""
    rows = len(initial_NP)
    _check(condition_MD, initial_NP, noise_TNP)
    options: dict[str, Any] = {
        "guidance_scale": guidance_scale,
        "temperature": temperature,
        "x0_range": x0_range,
        "num_timesteps": num_timesteps,
        "solver": solver,
        "moments": moments,
    }
    tensors = {"condition_MD": condition_MD, "initial_NP": initial_NP, "noise_TNP": noise_TNP}
    folded = isinstance(head, FoldedHead)
    if needs_pytorch({**tensors, **head}) or not (folded or _triton_takes(head)):
        if folded:
            raise ValueError("a folded head has no gradients; give the published parameters")
        torch_loop = denoise_loop.implementations["torch"]
        result: Tensor = torch_loop(head, condition_MD, level, initial_NP, noise_TNP, **options)
        return result
    if rows == 0:
        return initial_NP.float()
    guided = len(condition_MD) == 2 * rows and guidance_scale != 1.0
    if not guided:
        condition_MD = condition_MD.narrow(0, 0, rows)  # fake CUDA tensors refuse slices
    return denoise(head, condition_MD, level, initial_NP, noise_TNP, **options)


def _triton_takes(head: Mapping[str, Tensor]) -> bool:
    """Whether the kernels multiply in the dtype of these parameters."""
    return head["input_proj.weight"].dtype in (torch.float32, torch.float16, torch.bfloat16)


denoise_loop.register("native", _denoise_loop_native)
denoise_loop.register("triton", _denoise_loop_triton)
