"""Noised tokens for training: the forward process of the diffusion."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastfar.diffusion import device_table, repeated_rows, repeats, timestep_coefficients
from fastfar.kernels.gpu._launch import is_recording
from fastfar.ops import _rows
from fastfar.ops._registry import op
from fastfar.ops._triton import architecture, kernels, traced


@op
def add_noise(
    x0_RP: Tensor, noise_NP: Tensor, timestep_N: Tensor, *, num_timesteps: int = 1000
) -> Tensor:
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise, each row at its own t.

    Args:
        x0_RP: (R, P) clean tokens; row n of the result is made of its row n modulo R, so that a
            batch multiplier N / R repeats no rows in memory.
        noise_NP: (N, P).
        timestep_N: (N,) int64 in 0..num_timesteps - 1.

    Returns:
        (N, P), x0's and noise's common dtype.

    Raises:
        ValueError: N is no multiple of R.

    Triton: float32, float16 and bfloat16, float32 arithmetic. A timestep out of range is not seen
    (looking would wait for the GPU): the nearest in range is taken.

    Source: improved DDPM, arXiv 2102.09672, eq. 9 with the cosine schedule of eq. 17.
    """
    signal_N1, sigma_N1 = timestep_coefficients(
        timestep_N, "signal sigma", num_timesteps, x0_RP.dtype
    )
    noised_NP: Tensor = signal_N1 * repeated_rows(x0_RP, len(noise_NP)) + sigma_N1 * noise_NP
    return noised_NP


# --- triton ----------------------------------------------------------------------------------


def _empty(x0_RP: Tensor, noise_NP: Tensor) -> Tensor:
    dtype = torch.promote_types(x0_RP.dtype, noise_NP.dtype)
    return noise_NP.new_empty(noise_NP.shape, dtype=dtype)


def _run(x0_RP: Tensor, noise_NP: Tensor, timestep_N: Tensor, num_timesteps: int) -> Tensor:
    out_NP = _empty(x0_RP, noise_NP)
    if is_recording():  # nothing reads it
        table_2T = noise_NP.new_empty((2, num_timesteps), dtype=torch.float32)
    else:
        columns, device = ("signal", "sigma"), noise_NP.device
        table_2T = device_table(columns, num_timesteps, num_timesteps, device, torch.float32)
    kernels("add_noise").add_noise(
        _rows.rows(x0_RP), _rows.rows(noise_NP), timestep_N, table_2T, out_NP,
        arch=architecture(noise_NP),
    )  # fmt: skip
    return out_NP


@torch.library.custom_op("fastfar::add_noise_triton", mutates_args=())
def _forward(x0_RP: Tensor, noise_NP: Tensor, timestep_N: Tensor, num_timesteps: int) -> Tensor:
    return _run(x0_RP, noise_NP, timestep_N, num_timesteps)


@_forward.register_fake
def _(x0_RP: Tensor, noise_NP: Tensor, *rest: Any) -> Tensor:
    return _run(x0_RP, noise_NP, *rest) if is_recording() else _empty(x0_RP, noise_NP)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x0_RP, noise_NP, timestep_N, ctx.num_timesteps = inputs
    ctx.rows, ctx.dtypes = x0_RP.shape[0], (x0_RP.dtype, noise_NP.dtype)
    ctx.save_for_backward(timestep_N)


def _gradients(ctx: Any, dout_NP: Tensor) -> tuple[Tensor | None, ...]:
    """Of x0 the sum over its repetitions, of the noise; rare, so PyTorch computes them."""
    # The op, not the function: a compiler that traces this formula must not see the table.
    signal_N1, sigma_N1 = torch.ops.fastfar.timestep_coefficients(
        *ctx.saved_tensors, "signal sigma", ctx.num_timesteps, torch.float32
    )
    dx0_RP, dnoise_NP = None, None
    if ctx.needs_input_grad[0]:
        repeated_MRP = (signal_N1 * dout_NP).view(-1, ctx.rows, dout_NP.shape[1])
        dx0_RP = repeated_MRP.sum(dim=0).to(ctx.dtypes[0])
    if ctx.needs_input_grad[1]:
        dnoise_NP = (sigma_N1 * dout_NP).to(ctx.dtypes[1])
    return dx0_RP, dnoise_NP, None, None


_forward.register_autograd(_gradients, setup_context=_save)


def _triton_implementation(
    x0_RP: Tensor, noise_NP: Tensor, timestep_N: Tensor, *, num_timesteps: int = 1000
) -> Tensor:
    """See `add_noise`; PyTorch computes what is not of a dtype of the kernel."""
    if any(x.dtype not in _rows.DTYPES for x in (x0_RP, noise_NP)):
        plain: Tensor = add_noise.implementations["torch"](
            x0_RP, noise_NP, timestep_N, num_timesteps=num_timesteps
        )
        return plain
    rows, numbers = noise_NP.shape
    repeats(x0_RP, rows)  # or a ValueError
    _rows.check(
        "add_noise",
        noise=(noise_NP, (rows, numbers)),
        x0=(x0_RP, (x0_RP.shape[0], numbers)),
    )
    if timestep_N.shape != (rows,) or timestep_N.device != noise_NP.device:
        raise ValueError(
            f"triton add_noise: timestep is {tuple(timestep_N.shape)} on {timestep_N.device}, "
            f"expected {(rows,)} on {noise_NP.device}"
        )
    run = _forward if _rows.recorded(x0_RP, noise_NP) or traced() else _run
    out_NP: Tensor = run(x0_RP, noise_NP, timestep_N, num_timesteps)
    return out_NP


add_noise.register("triton", _triton_implementation)
