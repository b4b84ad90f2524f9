"""x_t = signal_t x_0 + sigma_t noise, each row at its own t; rows of x_0 may be used repeatedly."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ._configs import config, row_tile
from ._launch import launch


@triton.jit
def add_noise_kernel(
    x0_ptr,
    noise_ptr,
    timestep_ptr,
    table_ptr,
    out_ptr,
    N,
    P,
    x0_rows,
    num_timesteps,
    x0_stride,
    noise_stride,
    timestep_stride,
    BN: tl.constexpr,
    BP: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    t = tl.load(timestep_ptr + rows * timestep_stride, mask=rows < N, other=0).to(tl.int64)
    t = tl.minimum(tl.maximum(t, 0), num_timesteps - 1)[:, None]
    signal, sigma = tl.load(table_ptr + t), tl.load(table_ptr + num_timesteps + t)
    x0_rows_ptr = x0_ptr + (rows % x0_rows * x0_stride)[:, None]
    noise_rows_ptr = noise_ptr + (rows * noise_stride)[:, None]
    out_rows_ptr = out_ptr + (rows * P)[:, None]
    for start in range(0, P, BP):
        columns = start + tl.arange(0, BP)[None, :]
        mask = (rows < N)[:, None] & (columns < P)
        x0 = tl.load(x0_rows_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        noise = tl.load(noise_rows_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        noised = signal * x0 + sigma * noise
        tl.store(out_rows_ptr + columns, noised.to(out_ptr.dtype.element_ty), mask=mask)


def add_noise(
    x0_RP: Any, noise_NP: Any, timestep_N: Any, table_2T: Any, out_NP: Any, *, arch: int
) -> None:
    """out[n] = table[0, t_n] x0[n modulo R] + table[1, t_n] noise[n].

    Args:
        x0_RP, noise_NP: float32, float16 or bfloat16; rows at any distance, numbers of a row side
            by side.
        timestep_N: integers; out of range means the nearest in range.
        table_2T: (2, T) float32, contiguous: signal and sigma of every timestep.
        out_NP: contiguous result.
        arch: architecture, see `_configs.config`.
    """
    rows, numbers = noise_NP.shape
    for x in (x0_RP, noise_NP):
        assert numbers == 1 or x.stride(1) == 1, "rows must be contiguous"
    chosen = config("add_noise", arch, 4)
    tile = row_tile(chosen, numbers)
    launch(
        add_noise_kernel,
        (triton.cdiv(rows, tile["BN"]),),
        x0_RP,
        noise_NP,
        timestep_N,
        table_2T,
        out_NP,
        rows,
        numbers,
        x0_RP.shape[0],
        table_2T.shape[1],
        x0_RP.stride(0),
        noise_NP.stride(0),
        timestep_N.stride(0),
        **tile,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )
