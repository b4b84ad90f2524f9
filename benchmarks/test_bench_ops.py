"""Every op by every path, by pytest-benchmark: `python -m pytest benchmarks/test_bench_ops.py`.

Nothing is timed whose result is wrong: the gate runs first. Not part of `make test`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastfar import FARConfig
from fastfar.bench import ops
from fastfar.bench.cases import CASES, PRESETS


@pytest.mark.parametrize("path", ops.PATHS)
@pytest.mark.parametrize("dtype", ops.DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", CASES)
def test_op(
    benchmark: Any,
    timed: Callable[..., None],
    device: torch.device,
    name: str,
    preset: str,
    dtype: torch.dtype,
    path: str,
) -> None:
    config = FARConfig.preset(preset)
    (problem,) = ops.problems([name], {preset: config})
    options = ops.Options("pytest", device, (path,), (dtype,))
    contenders, _ = ops.contend(problem, options)
    if not contenders:
        pytest.skip(f"{name} has no path {path} in {dtype}")
    ((_, contender),) = contenders
    if contender.run is None:
        pytest.skip(contender.note)
    assert contender.green, f"wrong result: {contender.error}, allowed {contender.limit}"
    benchmark.group = f"{name} {preset} {str(dtype)[6:]}"
    with torch.inference_mode():
        timed(
            contender.run,
            dtype,
            contender.executed,
            op=name,
            path=path,
            shape=preset,
            reference_flops=problem.case.flops(config, 1),
            error=contender.error,
            error_limit=contender.limit,
        )
