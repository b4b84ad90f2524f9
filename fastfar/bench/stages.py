"""Where the time of an image goes: seconds of each stage, by the ranges of `fastfar.profiling`.

On a CPU a clock listens to the ranges as they are opened and closed, which costs nothing that
shows. A GPU works behind the host, and a CUDA graph has no ranges: there PyTorch's profiler adds up
the kernels of each range, launched one by one, without the gaps between them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._C._autograd import DeviceType

from fastfar import graphs, profiling
from fastfar.bench.timing import Device, now
from fastfar.reference import sampling as published

TRANSFORMER, HEAD, DECODE, REST = "transformer", "head", "decode", "rest"
# Name of a range -> its stage; other ranges contain these or are part of the rest.
STAGES = {"encoder": TRANSFORMER, "decoder": TRANSFORMER} | {
    name: name for name in (TRANSFORMER, HEAD, DECODE)
}


@dataclass(frozen=True)
class Profile:
    """One run, taken apart.

    Attributes:
        stages: seconds of "transformer", "head" and "decode", as far as the run has them; on a CPU
            also "rest", so that they sum to the whole.
        kernels: of a GPU, name -> (calls, seconds).
    """

    stages: dict[str, float]
    kernels: dict[str, tuple[int, float]] = field(default_factory=dict)


def profile(run: Callable[[], object], device: Device = "cpu") -> Profile:
    """Run once, outside of any CUDA graph, and take the run apart."""
    with graphs.disabled():
        if torch.device(device).type == "cuda":
            return _profiled(run, device)
        clock = StageClock()
        start = time.perf_counter()
        with profiling.heard_by(clock):
            run()
        whole = time.perf_counter() - start
    return Profile(clock.seconds | {REST: whole - sum(clock.seconds.values())})


class StageClock:
    """Listener that adds up seconds by stage; a stage within another is part of the outer one.

    `seconds` maps the stages that were seen to what they took.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside = False

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        stage = STAGES.get(name)
        if stage is None or self._inside:
            yield
            return
        self._inside, start = True, time.perf_counter()
        try:
            yield
        finally:
            self._inside = False
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


@contextmanager
def reference_ranges() -> Iterator[None]:
    """Ranges "transformer" and "head" for the published loop, which knows PyTorch alone."""
    parts = {"condition": TRANSFORMER, "denoise_loop": HEAD}
    before = {name: getattr(published, name) for name in parts}

    def ranged(function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with profiling.annotate(stage):
                return function(*args, **kwargs)

        return run

    for name, stage in parts.items():
        setattr(published, name, ranged(before[name], stage))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(published, name, function)


def _profiled(run: Callable[[], object], device: Device) -> Profile:
    activities = torch.profiler.supported_activities()  # type: ignore[no-untyped-call]
    with profiling.ranges(), torch.profiler.profile(activities=activities) as profiled:
        run()
        now(device)
    stages: dict[str, float] = {}
    kernels: dict[str, tuple[int, float]] = {}
    for event in profiled.events() or ():
        on_host = event.device_type == DeviceType.CPU
        if on_host and event.name in STAGES:
            stage = STAGES[event.name]
            stages[stage] = stages.get(stage, 0.0) + event.device_time_total * 1e-6
        elif not on_host and not getattr(event, "is_user_annotation", False):
            calls, seconds = kernels.get(event.name, (0, 0.0))
            kernels[event.name] = (calls + 1, seconds + event.time_range.elapsed_us() * 1e-6)
    return Profile(stages, kernels)
