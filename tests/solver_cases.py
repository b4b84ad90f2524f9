"""Solvers that every back end is tested with, and moments for those that want some."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastfar.solver import Moments, Solver

STEPS = 4
SOLVERS = {
    "clamped log": Solver(variance="clamped_log"),
    "linear": Solver(variance="linear", spacing="log_snr", first_timestep=950),
    "table": Solver(
        variance="table", variance_table=tuple((0.9 - 0.2 * i,) for i in range(STEPS))
    ),
    "closure": Solver(variance="closure", start="moments", first_timestep=900),
    "ddim": Solver(method="ddim", timesteps=(870, 500, 220, 31)),
    "2M": Solver(method="dpmpp_2m", spacing="log_snr", first_timestep=900, start="moments"),
    "SDE-2M": Solver(method="sde_dpmpp_2m", spacing="log_snr"),
    "guidance range": Solver(
        method="dpmpp_2m", timesteps=(870, 500, 220, 31), guidance_range=(100, 600)
    ),
    "no guidance": Solver(first_timestep=900, guidance_range=(950, 999)),
}
OPTIONS: dict[str, Any] = {"guidance_scale": 2.5, "temperature": 0.9, "x0_range": (-1.5, 2.0)}


def moments(rows: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variances and basis, float64."""
    basis_PP, _ = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))
    mean_NP = torch.randn(rows, channels, dtype=torch.float64)
    return mean_NP, torch.rand(rows, channels, dtype=torch.float64) + 0.05, basis_PP


def with_moments(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`op` with the parts of its moments as its last three arguments."""

    def run(*args: Any, **options: Any) -> Tensor:
        return op(*args[:-3], moments=Moments(*args[-3:]), **options)

    return run
