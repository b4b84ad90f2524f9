"""The cost model beside what was measured in one run on an H100 80GB HBM3.

PyTorch 2.11, CUDA 13.0, Triton 3.6. Three kinds of figures: periods of a kernel that a CUDA graph
repeats; kernels alone by the profiler, inside of FAR-H's denoising loop, without the gap to the
next one; whole loops in a graph. What constants were fitted to comes first: it proves nothing but
that they are used as they were taken.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F

from fastfar.config import FARConfig
from fastfar.costs import image, kernels
from fastfar.costs.gpus import GPUS
from fastfar.costs.kernels import Touch, Work, price
from fastfar.costs.published import published
from fastfar.costs.trace import tracing
from fastfar.ops.residual_layernorm import residual_layernorm_rows
from fastfar.plan import SamplingPlan

pytest.importorskip("triton", minversion="3.2")  # a folder of that name has no version
H100 = GPUS["h100"]
BF16 = torch.bfloat16
FAR_H = FARConfig.preset("far_huge")
MIB = 1 << 20

PRODUCTS = {  # m, n, k -> microseconds of cuBLAS in bfloat16, repeated in a graph
    (512, 1024, 1024): 4.46,
    (640, 3840, 1280): 11.14,
    (640, 5120, 1280): 14.44,
    (640, 1280, 5120): 19.45,
    (640, 1280, 1280): 6.21,
    (4096, 10272, 1024): 119.89,
}
# Microseconds of a kernel in the loop, and the error that is allowed. `step` is a chain of products
# of 16 rows, whose own latency the model leaves out.
IN_THE_LOOP = {
    "mm": (4.89, 0.4),  # first product of a block
    "addmm": (5.17, 0.4),  # second
    "modulations": (129.7, 0.4),
    "activate": (5.28, 0.4),
    "add_silu": (2.32, 0.4),
    "gate_layernorm": (3.57, 0.4),
    "step": (10.10, 0.6),
}
LOOPS = {(1, 100): 79.29, (4, 10): 51.44, (64, 10): 40.16}  # batch, T -> us of a step and image


def near(expected: float, measured: float, allowed: float) -> None:
    assert abs(expected / measured - 1) <= allowed, f"{expected:.3g} expected, {measured} measured"


def stream(size: int) -> Work:
    """So many bytes from one tensor to another."""
    touches = Touch(1, size, size), Touch(2, size, size, writes=True)
    return kernels.stream("copy", size // 4, touches)


def test_what_constants_were_fitted_to() -> None:
    """Seconds: a large product, a copy in memory, one in L2, next to nothing, attention."""
    large = kernels.library_product(H100, "mm", 8192, 8192, 8192, 2)
    near(price(large, H100).seconds, 2 * 8192**3 / 784e12, 0.05)
    near(price(stream(1 << 30), H100, memory_bytes=2 << 30).seconds, (2 << 30) / 2.33e12, 0.02)
    near(price(stream(8 * MIB), H100).seconds, 4.0e-6, 0.05)
    near(price(stream(16 * MIB), H100).seconds, 7.7e-6, 0.15)
    near(price(stream(128), H100).seconds, 1.22e-6, 0.02)
    with tracing(H100) as tracer:
        q = torch.empty(2, 16, 320, 80, dtype=BF16, device="cuda:0")
        F.scaled_dot_product_attention(q, q, q)
    near(price(tracer.events[0].work, H100).seconds, 11.44e-6, 0.05)
    # The host bounds the published way, decoding (a few per mille) left out.
    way = published(FAR_H, SamplingPlan.official(), H100)
    near(way.seconds, 2.36, 0.05)
    assert way.image.kernels.seconds < 0.15 * way.seconds


@pytest.mark.parametrize("sizes", PRODUCTS, ids=str)
def test_products(sizes: tuple[int, int, int]) -> None:
    expected = price(kernels.library_product(H100, "mm", *sizes, 2), H100).seconds * 1e6
    near(expected, PRODUCTS[sizes], 0.25)


def test_layernorm_of_a_block() -> None:
    """640 x 1280; the mean of the two in a block, without an update and with one."""
    with tracing(H100) as tracer:
        x, update = (torch.empty(640, 1280, dtype=BF16, device="cuda:0") for _ in range(2))
        vectors = [torch.empty(1280, dtype=BF16, device="cuda:0") for _ in range(2)]
        tracer.know([x, update, vectors])
        for each in (None, update):
            residual_layernorm_rows(x, each, *vectors, 1e-6, BF16)
    first, second = (event.work for event in tracer.events)
    assert first.name == second.name == "residual_layernorm" and first.moved < second.moved
    near(mean_alone([first, second]), 2.66, 0.4)


def loop(batch: int, steps: int) -> tuple[list[Work], int]:
    """Kernels of the first chunks of a guided denoising loop of FAR-H, and steps of a chunk."""
    plan = SamplingPlan.official(diffusion_steps=steps)
    with tracing(H100) as tracer:
        runner = image._Runner(tracer, FAR_H, plan, batch, BF16)
        runner.trace(1, 1, 1)  # tables are made at first use
        events = runner.trace(1, 1)
    return [event.work for event in events if event.stage == "head"], runner.chunk(1)


def mean_alone(works: Iterable[Work]) -> float:
    """Microseconds without the gap to the next kernel."""
    seconds = [cost.seconds - H100.launch_gap for cost in kernels.price_all(list(works), H100)]
    return sum(seconds) / len(seconds) * 1e6


def test_kernels_of_the_loop() -> None:
    works, chunk = loop(1, 24)
    assert chunk == 8
    found: dict[str, list[float]] = {}
    for work, cost in zip(works, kernels.price_all(works, H100), strict=True):
        large = work.name == "addmm" and work.flops > 1e10
        name = "modulations" if large else work.name
        found.setdefault(name, []).append((cost.seconds - H100.launch_gap) * 1e6)
    expected = {name: sum(found[name]) / len(found[name]) for name in IN_THE_LOOP}
    table = {name: f"{x:.2f} of {IN_THE_LOOP[name][0]}" for name, x in expected.items()}
    for name, (measured, allowed) in IN_THE_LOOP.items():
        assert abs(expected[name] / measured - 1) <= allowed, (name, table)


@pytest.mark.parametrize(("batch", "steps"), LOOPS, ids=str)
def test_the_whole_loop(batch: int, steps: int) -> None:
    works, chunk = loop(batch, steps)
    cost = image.head_cost(works, H100, steps, chunk, min(steps, image._CHUNKS * chunk))
    near(cost.seconds / steps / batch * 1e6, LOOPS[batch, steps], 0.25)
