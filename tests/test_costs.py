"""The cost model: its figures, its formulas by hand, and what it says of traced runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastfar.config import FARConfig
from fastfar.costs import gpus, image, kernels
from fastfar.costs.gpus import GPUS
from fastfar.costs.kernels import Cache, Touch, Work, price, price_all, product
from fastfar.costs.published import published
from fastfar.costs.trace import tracing
from fastfar.diffusion import diffusion_tables
from fastfar.plan import SamplingPlan
from fastfar.solver import Solver

# One FLOP, one byte, one everything: times can be read off.
TOY = dataclasses.replace(
    GPUS["h100"],
    half=4e12,
    memory=1e12,
    l2_size=1000.0,
    l2=2e12,
    sms=4,
    clock=1e9,
    sm_bytes=1000.0,
    memory_share=1.0,
    latency=1e-6,
    library_share=1.0,
    triton_share=0.5,
    launch_gap=3e-6,
)
SMALL = FARConfig(
    width=64,
    encoder_depth=4,
    decoder_depth=3,
    num_heads=2,
    head_depth=1,
    head_width=64,
    buffer_size=4,
    num_classes=5,
)
H100 = GPUS["h100"]


# --- figures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GPUS)
def test_figures_are_consistent(name: str) -> None:
    """The tensor peak is a power of two of FLOPs per clock and SM, within 5 %."""
    gpu = gpus.find(name)
    each = math.log2(gpu.half / gpu.sms / gpu.clock)
    assert abs(each - round(each)) < 0.07
    assert gpu.half >= 2 * gpu.tf32 * 0.99 and gpu.tf32 >= gpu.fp32
    assert gpu.memory < gpu.l2 <= gpu.sms * gpu.sm_bytes * gpu.clock * 1.01
    assert 0 < gpu.attention_share <= gpu.triton_share <= gpu.library_share < 1
    assert gpu.peak(torch.float16) == gpu.half
    assert gpu.peak(torch.float32) == max(gpu.fp32, gpu.tf32 / 3)


def test_a_gpu_is_found_by_its_driver_name() -> None:
    for text, name in (
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H20", "h20"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
    ):
        found = gpus.of_device(text)
        assert found is not None and found.name == name
    assert gpus.of_device("NVIDIA H100 PCIe") is None  # another chip in all but its name
    assert gpus.of_device("Radeon") is None
    with pytest.raises(ValueError, match="'v100'; there are h100, h200"):
        gpus.find("v100")


# --- one kernel ------------------------------------------------------------------------------


def test_a_product_by_hand() -> None:
    work = product("x", 100, 130, 60, tile=(64, 64), k_tile=32, tile_bytes=6)
    assert work.programs == 2 * 3
    assert work.flops == 6 * 2 * 64 * 64 * 64  # all three sizes padded
    assert work.moved == 6 * ((64 * 2 + 64 * 2) * 64 + 64 * 64 * 6)
    assert product("x", 64, 64, 64, tile=(64, 64), batch=3).programs == 3


def test_the_bounds_by_hand() -> None:
    cost = price(Work("x", 4, flops=8e6, moved=4000.0), TOY, memory_bytes=4e6)
    # One program an SM: 2e6 FLOPs at 1e12, 1000 bytes at 1e12; L2 at 2e12, memory at 1e12.
    assert cost.parts == pytest.approx({"tensor": 2e-6, "SM": 1e-9, "L2": 2e-9, "memory": 4e-6})
    assert cost.bound == "launch"  # two latencies and the gap take 5e-6
    assert cost.seconds == pytest.approx(9e-6)
    assert price(Work("x", 4, trips=4), TOY).seconds == pytest.approx(7e-6)
    half = dataclasses.replace(TOY, memory_share=0.5)
    assert price(Work("x", 4), half, memory_bytes=4e6).parts["memory"] == pytest.approx(8e-6)
    assert price(Work("x", 4, flops=8e7), TOY).bound == "tensor"
    assert price(Work("x", 1, moved=2e7), TOY).bound == "SM"
    assert price(Work("x", 4, moved=4e8), TOY).bound == "L2"


def test_waves_and_shares() -> None:
    def tensor(programs: int, kind: str = "library") -> float:
        return price(Work("x", programs, flops=1e6 * programs, kind=kind), TOY).parts["tensor"]

    assert tensor(1) == tensor(4) == pytest.approx(1e-6)
    assert tensor(5) == tensor(8) == pytest.approx(2e-6)  # a second wave, full or not
    assert tensor(4, "triton") == pytest.approx(2e-6)


def test_what_is_under_way_bounds_an_sm() -> None:
    """Little's law: 100 bytes per microsecond of latency, where the port would give 1e6."""
    cost = price(Work("x", 4, moved=4e6, in_flight=100.0), TOY)
    assert cost.parts["SM"] == pytest.approx(1e6 / (100.0 / 1e-6))


def test_float32_takes_three_products() -> None:
    works = [Work("x", 132, flops=1e12, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    slow, fast = (price(work, H100).parts["tensor"] for work in works)
    assert slow == pytest.approx(fast * H100.half / (H100.tf32 / 3))


def test_more_is_never_faster() -> None:
    for field, values in {
        "flops": (1e9, 1e10, 1e11),
        "moved": (1e6, 1e8, 1e9),
    }.items():
        times = [price(Work("x", 100, **{field: v}), H100).seconds for v in values]
        assert times == sorted(times) and times[0] < times[-1]
    times = [price(Work("x", 100), H100, memory).seconds for memory in (0.0, 1e7, 1e8)]
    assert times == sorted(times) and times[0] < times[-1]


def test_a_library_shares_panels_and_takes_its_fastest_tile() -> None:
    chosen = kernels.library_product(H100, "mm", 8192, 8192, 1024, 2)
    assert chosen.programs == 32 * 64
    assert price(kernels.library_product(GPUS["a100"], "mm", 8192, 8192, 1024, 2),
                 GPUS["a100"]).bound == "tensor"  # fmt: skip
    assert kernels.library_product(H100, "mm", 64, 256, 1024, 2).programs == 4
    assert chosen.multicast == chosen.programs * 256 * 1024 * 2 / 2  # two tiles, one panel
    assert kernels.library_product(GPUS["a100"], "mm", 8192, 8192, 1024, 2).multicast == 0


# --- L2 --------------------------------------------------------------------------------------


def test_cache() -> None:
    cache = Cache(100.0)
    read = [Touch(i, 40, 40) for i in range(4)]
    assert cache.touch(read[:1]) == 40 and cache.touch(read[:1]) == 0
    assert cache.touch([read[1]]) == 40 and cache.touch([read[0]]) == 0
    assert cache.touch([read[2]]) == 40  # displaces 1, which was used least recently
    assert cache.touch([read[0]]) == 0 and cache.touch([read[1]]) == 40
    assert cache.touch([Touch(9, 90, 90, writes=True)]) == 0  # displaces all, nothing written
    assert cache.touch([Touch(9, 90, 10)]) == 0
    assert cache.touch([read[3]]) == 40 + 90  # what was written goes to memory
    assert cache.touch([Touch(7, 1000, 1000)]) == 1000
    assert cache.touch([Touch(7, 1000, 1000)]) == 1000  # never held
    # A part of it displaces as much as it has.
    assert cache.touch(read[:2]) == 80 and cache.touch([Touch(7, 1000, 30)]) == 30
    assert cache.touch([read[1]]) == 0 and cache.touch([read[0]]) == 40


def test_a_warm_cache_holds_what_fits() -> None:
    weights = [Work("x", 1, moved=400.0, touches=(Touch(i, 400, 400),)) for i in range(2)]
    assert [cost.memory_bytes for cost in price_all(weights, TOY)] == [400, 400]
    assert [cost.memory_bytes for cost in price_all(weights, TOY, warm=True)] == [0, 0]
    third = Work("x", 1, touches=(Touch(5, 400, 400),))
    assert all(cost.memory_bytes for cost in price_all([*weights, third], TOY, warm=True))


# --- tracing ---------------------------------------------------------------------------------


def _linear(x: Tensor, w: Tensor) -> Tensor:
    return F.gelu(F.linear(x[:, :128], w[:, :128]))


def _attention(x: Tensor, w: Tensor) -> Tensor:
    q = x.view(2, 128, 4, 64).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q)


def _convolution(x: Tensor, w: Tensor) -> Tensor:
    return F.conv2d(x.view(1, 256, 16, 16), w.view(256, 256, 1, 1).expand(-1, -1, 3, 3), padding=1)


@pytest.mark.parametrize("function", [_linear, _attention, _convolution])
def test_flops_of_library_calls(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Sizes that no tile pads: PyTorch's own counter says the same."""
    x, w = torch.zeros(256, 256), torch.zeros(256, 256)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function(x, w)
    with tracing(H100) as tracer:
        x, w = (torch.empty(256, 256, device="cuda:0") for _ in range(2))
        tracer.know([x, w])
        out = function(x, w)
        assert out.device.type == "cuda"
    assert sum(event.work.flops for event in tracer.events) == counter.get_total_flops() > 0
    assert not tracer.copies and not tracer.syncs


def test_what_counts_as_a_kernel() -> None:
    table = torch.arange(8.0)
    with tracing(H100) as tracer:
        x = torch.empty(4, 8, device="cuda:0")
        tracer.know(x)
        y = x.view(8, 4).t()[1:, None, ..., 0] + x.new_empty(7 - 4, 1)  # views are free
        y = y * table.to(x.device)[0]  # a copy; the entry is a view
        assert y.sum().item() == 0.0  # and this waits for the GPU
    assert [event.work.name for event in tracer.events] == ["add", "mul", "sum"]
    assert len(tracer.copies) == len(tracer.syncs) == 1
    read = tracer.events[0].work.touches
    assert [each.nbytes for each in read] == [12, 12, 12] and read[-1].writes


def test_tracing_leaves_no_fake_tables() -> None:
    with tracing(H100):
        diffusion_tables(7, 100)
    assert type(diffusion_tables(7, 100).timestep) is Tensor


# --- images ----------------------------------------------------------------------------------

PLAN = SamplingPlan.official(diffusion_steps=20)
BATCH = 4  # 2048 rows with guidance: chunks of two diffusion steps


@pytest.fixture(scope="module")
def prediction() -> image.Prediction:
    return image.predict(SMALL, PLAN, H100, BATCH)


def test_stages_add_up(prediction: image.Prediction) -> None:
    total = prediction.total
    for field in ("launches", "flops", "moved", "memory", "seconds"):
        parts = sum(getattr(stage, field) for stage in prediction.stages.values())
        assert getattr(total, field) == pytest.approx(parts)
    for stage in prediction.stages.values():
        assert sum(stage.bounds.values()) == pytest.approx(stage.seconds)
    head = prediction.stages["head modulations"] + prediction.stages["head chain"]
    assert head.seconds == pytest.approx(prediction.head)
    assert prediction.seconds == pytest.approx(total.seconds)


def test_kernels_of_a_diffusion_step(prediction: image.Prediction) -> None:
    """4 d + 1 of the chain, and three a chunk: two of its modulations, one that begins it."""
    chunks = [head.chunk for head in prediction.heads]
    assert set(chunks) == {2, 4}  # the first step has half of the rows
    for head in prediction.heads:
        assert head.chain.launches == pytest.approx(20 * 5 + 20 / head.chunk)
        assert head.modulations.launches == pytest.approx(20 / head.chunk * 2)
    assert prediction.launches_per_step == pytest.approx(5 + 0.1 * 3 / 4 + 0.9 * 3 / 2)


def test_kernels_of_a_guidance_range() -> None:
    """Switched twice: three chunks, and a copy and zeros where a later loop starts."""
    solver = Solver(timesteps=(900, 500, 400, 10), guidance_range=(300, 600))
    plan = PLAN.with_changes(diffusion_steps=4, solvers=solver)
    first, *later = image.predict(SMALL, plan, H100, BATCH).heads
    assert (first.chain.launches, first.modulations.launches) == (4 * 5 + 1, 2)
    for head in later:
        assert (head.chain.launches, head.modulations.launches) == (4 * 5 + 3 + 2 * 2, 3 * 2)


def test_a_moment_head_is_not_priced() -> None:
    plan = PLAN.with_changes(solvers=Solver(start="moments"))
    with pytest.raises(ValueError, match="moment head"):
        image.predict(SMALL, plan, H100)


def test_a_batch_costs_less_than_its_images(prediction: image.Prediction) -> None:
    one = image.predict(SMALL, PLAN, H100)
    assert one.seconds < prediction.seconds < BATCH * one.seconds
    assert prediction.reference_flops == BATCH * one.reference_flops


def test_blocks_and_chunks_are_continued_rightly(
    prediction: image.Prediction, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tracing more blocks and more chunks gives the same sums."""
    monkeypatch.setattr(image, "_BLOCKS", 3)
    monkeypatch.setattr(image, "_CHUNKS", 100)
    whole = image.predict(SMALL, PLAN, H100, BATCH)
    for name, stage in prediction.stages.items():
        for field in ("launches", "flops", "moved"):
            expected = getattr(whole.stages[name], field)
            assert getattr(stage, field) == pytest.approx(expected, rel=0.03), (name, field)
        assert stage.seconds == pytest.approx(whole.stages[name].seconds, rel=0.03), name


def test_masks_make_the_encoder_shorter(prediction: image.Prediction) -> None:
    """Two outer steps: all tokens masked, then 15 of 16."""
    names = [field.name for field in dataclasses.fields(PLAN)]
    whole = SamplingPlan.official("mask", diffusion_steps=1)
    cut = {n: getattr(whole, n)[:2] for n in names if isinstance(getattr(whole, n), tuple)}
    masked = image.predict(SMALL, dataclasses.replace(whole, **cut), H100, BATCH).stages
    every = prediction.stages
    assert masked["encoder"].flops / 2 < 0.7 * every["encoder"].flops / 10
    # The first of the ten steps has one half only; so have both here.
    assert masked["decoder"].flops / 2 <= every["decoder"].flops / 10


def test_the_published_way() -> None:
    """Its kernels do not depend on the sizes; each diffusion step copies six coefficients."""
    way = published(SMALL, PLAN, H100)
    assert way.step.copies == 6 and way.transformer.copies == 0
    assert 60 < way.step.kernels.launches < 100
    assert way.transformer.kernels.launches == pytest.approx(12 * 7, abs=20)
    assert way.image.kernels.launches > 200 * way.step.kernels.launches
    host = way.step.kernels.launches * gpus.EAGER_CALL + 6 * gpus.BLOCKING_COPY
    assert way.step.seconds(H100) == pytest.approx(host)
