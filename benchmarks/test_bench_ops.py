"""Every op beside its reference, by pytest-benchmark: `python -m pytest benchmarks`.

Nothing is timed whose result is wrong: the gate runs first. Not part of `make test`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from tolerances import assert_close_to_reference

from benchmarks.cases import CASES, PRESETS, STEPS
from benchmarks.rows import environment, matmul_peak
from fastfar import FARConfig

pytest.importorskip("pytest_benchmark")
peak = cache(matmul_peak)


@pytest.mark.parametrize("which", ["reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", CASES)
def test_op(benchmark: Any, name: str, preset: str, dtype: torch.dtype, which: str) -> None:
    case, config, batch = CASES[name], FARConfig.preset(preset), 1
    args, kwargs = case.inputs(config, batch, dtype)
    if which == "torch":
        assert_close_to_reference(
            case.op,
            case.reference,
            *args,
            dtype=dtype,
            gradients=False,
            layers=4 * STEPS,
            **kwargs,
        )
    function = case.op if which == "torch" else case.reference
    count = case.executed_flops if which == "torch" else case.flops
    with torch.inference_mode():
        out = function(*args, **kwargs)
        benchmark.group = f"{name} {preset} {dtype}"
        benchmark.extra_info.update(
            environment(),
            op=name,
            backend=which,
            dtype=str(dtype),
            shape=f"{preset}, batch {batch}",
            flops=case.flops(config, batch),
            executed_flops=count(config, batch),
            bytes=case.bytes_moved((args, kwargs), out),
        )
        benchmark(function, *args, **kwargs)
    if benchmark.stats is not None:
        rate = count(config, batch) / benchmark.stats.stats.median
        benchmark.extra_info["share_of_peak"] = rate / peak(dtype)
