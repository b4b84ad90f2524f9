"""Benchmark rows: see `fastfar.costs.rows`; scripts of this folder keep theirs in `RESULTS`."""

from __future__ import annotations

from pathlib import Path

from fastfar.costs.rows import (
    append,
    commit,
    cpu_name,
    environment,
    matmul_peak,
    native_isa,
    quantiles,
)

RESULTS = Path(__file__).parent / "results"

__all__ = [
    "RESULTS",
    "append",
    "commit",
    "cpu_name",
    "environment",
    "matmul_peak",
    "native_isa",
    "quantiles",
]
