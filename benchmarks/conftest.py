"""Options and the one way of timing of the pytest-benchmark suites of this folder."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastfar.bench import peak, subjects, timing
from fastfar.bench.rows import environment
from fastfar.profiling import ranges

if importlib.util.find_spec("pytest_benchmark") is None:
    collect_ignore_glob = ["test_bench_*.py"]  # the extra `bench` brings it


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastfar")
    group.addoption("--device", default="cpu", help="that is measured: cpu, cuda, ...")
    group.addoption("--threads", type=int, help="of the CPU; PyTorch's number if left out")
    group.addoption("--nvtx", action="store_true", help="named ranges for an attached profiler")


@pytest.fixture(scope="session", autouse=True)
def settings(request: pytest.FixtureRequest) -> Any:
    """Threads and ranges, for the whole session."""
    if (threads := request.config.getoption("--threads")) is not None:
        torch.set_num_threads(threads)
    if request.config.getoption("--nvtx"):
        with ranges():
            yield
    else:
        yield


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def timed(benchmark: Any, device: torch.device) -> Callable[..., None]:
    """timed(function, dtype, executed, rounds=None, **about): with the peak before and after."""

    def run(
        function: Callable[[], Any],
        dtype: torch.dtype,
        executed: int | None,
        rounds: int | None = None,
        **about: Any,
    ) -> None:
        def finished() -> None:
            function()
            timing.now(device)

        def measure() -> None:
            if rounds is None:
                benchmark(finished)
            else:
                benchmark.pedantic(finished, rounds=rounds, warmup_rounds=1)

        _, flops = timing.around(measure, dtype, device)
        benchmark.extra_info.update(
            environment(device), **about, dtype=str(dtype).removeprefix("torch."),
            executed_flops=executed, peak_flops_per_s=flops, peak_kind=peak.kind(dtype, device),
        )  # fmt: skip
        if executed and benchmark.stats is not None:
            rate = executed / benchmark.stats.stats.median
            benchmark.extra_info["share_of_peak"] = rate / flops

    return run


@pytest.fixture
def timed_subject(
    benchmark: Any, timed: Callable[..., None], device: torch.device
) -> Callable[[str], None]:
    """timed_subject(selector): one image from label to pixels, if its gate is green."""

    def run(selector: str) -> None:
        (recipe,) = subjects.select([selector], device)
        if recipe.reason is not None:
            pytest.skip(recipe.reason)
        subject = recipe.build({})
        gate = subject.check()
        assert gate.green, f"wrong result: error {gate.error}, allowed {gate.limit}"
        labels_B, source = subject.labels(1), subject.draw(1)
        extrapolated = subject.extrapolation is not None  # timed is what is run, and that is part
        benchmark.group = f"one image of {subject.model}"
        timed(
            lambda: subject.decode(subject.run(labels_B, source)),
            subject.dtype,
            None if extrapolated else subject.executed_flops(1),
            rounds=3,
            subject=subject.key,
            mode=subject.mode,
            ways=subject.ways,
            random_weights=subject.random_weights,
            timed_part=subject.extrapolation,
            error=gate.error,
            error_limit=gate.limit,
        )

    return run
