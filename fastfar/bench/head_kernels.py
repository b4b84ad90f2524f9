"""Times of the head's kernels alone, beside what the cost model expects of them. CUDA only."""

from __future__ import annotations

import functools
import importlib
import statistics
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from fastfar.bench.far import FARSubject
from fastfar.bench.timing import flushed, graphed
from fastfar.costs import gpus, kernels
from fastfar.ops import denoise_loop
from fastfar.ops._folded_head import fold_head

STEPS = 8  # diffusion steps whose launches are recorded


@dataclass(frozen=True)
class KernelTime:
    """A kernel of the head beside the model: seconds from its start to the next one's.

    Attributes:
        name: see `kernels.launch_name`.
        programs: of a launch.
        count: launches in `STEPS` diffusion steps.
        seconds: measured, one launch.
        expected: by the model, None for a GPU without figures.
        flops: of a launch, executed.
    """

    name: str
    programs: int
    count: int
    seconds: float
    expected: float | None
    flops: float


def head_kernels(
    subject: FARSubject, batch: int, cold: bool = False, repeats: int = 50
) -> list[KernelTime]:
    """Time each kernel of a guided chunk of diffusion steps alone. CUDA only.

    The launches are recorded on real tensors, then each is captured `repeats` times in a graph:
    so the host is not in the way, and the gap between two kernels is part of the figure.
    cold: instead, each is launched behind a kernel that displaces L2, between two events.
    """
    with torch.cuda.device(subject.device):
        return _head_kernels(subject, batch, cold, repeats)


def _head_kernels(
    subject: FARSubject, batch: int, cold: bool, repeats: int
) -> list[KernelTime]:
    model, device, dtype = subject.weights.model, subject.device, subject.dtype
    config, head = model.config, fold_head(model.head_weights, dtype)
    tokens = batch * config.num_tokens
    condition = torch.randn(2 * tokens, config.width, device=device, dtype=dtype)
    initial = torch.randn(tokens, config.token_dim, device=device)
    noise = torch.randn(STEPS, tokens, config.token_dim, device=device)
    run = denoise_loop.implementations["triton"]
    options: dict[str, Any] = {"guidance_scale": 3.0, "temperature": 1.0, "x0_range": (-3.0, 3.0)}
    with torch.inference_mode():
        run(head, condition, 1.0, initial, noise, **options)  # compiles
        with importlib.import_module("fastfar.kernels.gpu._launch").recording() as launches:
            run(head, condition, 1.0, initial, noise, **options)
    gpu = gpus.of_device(torch.cuda.get_device_name(device))
    timer, samples = (flushed, 1) if cold else (graphed, 5)
    counted = Counter((kernels.launch_name(launch), launch.grid) for launch in launches)
    found = []
    for (name, grid), count in counted.items():
        launch = next(x for x in launches if (kernels.launch_name(x), x.grid) == (name, grid))
        work = kernels.launched(launch, lambda _: True)
        expected = None if gpu is None else kernels.price(work, gpu).seconds
        timed = timer(functools.partial(_start, launch), device, repeats)
        seconds = statistics.median(timed.seconds() for _ in range(samples))
        found.append(KernelTime(name, work.programs, count, seconds, expected, work.flops))
    return found


def _start(launch: Any) -> None:
    launch.kernel[launch.grid](*launch.args, **launch.options)
