"""Every op beside its reference, by pytest-benchmark: `python -m pytest benchmarks`.

Nothing is timed whose result is wrong: the gate runs first. Not part of `make test`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from tolerances import assert_close_to_reference

from benchmarks import peak
from benchmarks.cases import CASES, PRESETS, STEPS
from benchmarks.rows import environment, matmul_peak
from fastfar import FARConfig, _native

pytest.importorskip("pytest_benchmark")


@cache
def peak_of(dtype: torch.dtype) -> tuple[str, float]:
    """The yardstick's name and FLOP/s: PyTorch's own product where there is no native library."""
    if peak.reason() is None:
        return "registers", max(peak.peak_flops(dtype) for _ in range(5))
    return "torch.matmul", matmul_peak(dtype)


@pytest.mark.parametrize("which", ["reference", "torch", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", CASES)
def test_op(benchmark: Any, name: str, preset: str, dtype: torch.dtype, which: str) -> None:
    case, config, batch = CASES[name], FARConfig.preset(preset), 1
    if which == "native":
        if (missing := _native.reason()) is not None:
            pytest.skip(f"native library: {missing}")
        if "native" not in case.op.implementations:
            pytest.skip(f"{name} has no native implementation")
    args, kwargs = case.inputs(config, batch, dtype)
    function = case.reference if which == "reference" else case.op.implementations[which]
    if which != "reference":
        assert_close_to_reference(
            function,
            case.reference,
            *args,
            dtype=dtype,
            gradients=False,
            layers=4 * STEPS,
            **kwargs,
        )
    count = case.flops if which == "reference" else case.executed_flops
    if which == "native":  # as a packed model calls it
        args, kwargs = case.native_inputs(config, batch, dtype)
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
        yardstick, flops = peak_of(dtype)
        benchmark.extra_info.update(yardstick=yardstick, share_of_peak=rate / flops)
