"""Proof 3: sampling and training steps hold nothing that a CUDA graph forbids.

They run on fake CUDA tensors at far_base's sizes (few blocks): no wait for the device, no shape
that depends on values, no tensor of the host, no copy between host and device, and the same ops
with the same shapes whatever the inputs are.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import pytest
import torch
from fake_cuda import Call, Watch, fake_cuda, fake_far, fill_host_tables, own_tables
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from fastfar import SamplingPlan, TrainingDraws, diffusion_loss, levels
from fastfar.config import FARConfig
from fastfar.graphs import ImageGraph
from fastfar.model import FAR
from fastfar.ops import denoise_loop, use_backend
from fastfar.ops._folded_head import fold_head
from fastfar.outer_step import OuterStep
from fastfar.solver import PUBLISHED, Moments, Solver

pytest.importorskip("triton", minversion="3.2")  # a folder of that name has no version
CONFIG = dataclasses.replace(
    FARConfig.preset("far_base"), encoder_depth=1, decoder_depth=1, head_depth=3
)
STEPS = (1, 2, 1)
BACKENDS = pytest.mark.parametrize("name", ["torch", "triton"])
BF16 = torch.bfloat16

Body = Callable[[], None]


@pytest.fixture(autouse=True)
def host_tables() -> None:
    fill_host_tables(CONFIG)


def short(mode: str, ramp: tuple[float, ...]) -> SamplingPlan:
    """The first steps of a published plan; the guidance of each is 1 + 2 r."""
    plan = SamplingPlan.official(mode)
    count = len(STEPS)
    return plan.with_changes(
        levels=plan.levels[:count],
        input_levels=plan.input_levels[:count],
        temperatures=plan.temperatures[:count],
        guidance_ramp=ramp,
        diffusion_steps=STEPS,
        mask_ratios=None if plan.mask_ratios is None else plan.mask_ratios[:count],
    )


class WatchingCapturer:
    """Stands for `graphs.CudaCapturer`: what it would capture is run under a watch."""

    def __init__(self, warm: bool) -> None:
        self._warm = warm
        self.streams: list[list[Call]] = []

    def capture(self, bodies: Sequence[Body]) -> list[Body]:
        for body in [] if self._warm else bodies:
            body()
        for body in bodies:
            with Watch() as watch:
                body()
            self.streams.append(watch.calls)
        return list(bodies)

    def fill(self, buffer: Tensor, value: Tensor) -> None:
        raise NotImplementedError

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        yield


def fake_step(plan: SamplingPlan, name: str) -> OuterStep:
    model = fake_far(CONFIG, BF16)
    head = fold_head(model.head_weights, BF16) if name == "triton" else model.head_weights
    return OuterStep(model, head, plan, BF16)


def captured(
    step: OuterStep, batch: int, *, whole: bool = True, warm: bool = False
) -> list[list[Call]]:
    """Op streams of the graphs that sampling would capture; warm: tables are there already."""
    capturer = WatchingCapturer(warm)
    ImageGraph(step, batch, whole, capturer)
    return capturer.streams


@BACKENDS
@pytest.mark.parametrize(
    ("mode", "ramp", "batch"),
    [("nomask", (0.0, 0.5, 0.0), 1), ("mask", (1.0, 0.0, 0.5), 3)],
    ids=["nomask", "mask"],
)
def test_sampling(mode: str, ramp: tuple[float, ...], batch: int, name: str) -> None:
    """Guided and not, at the first step and at later ones."""
    with fake_cuda(), torch.inference_mode(), use_backend(name):
        step = fake_step(short(mode, ramp), name)
        (first,) = captured(step, batch)
        (second,) = captured(step, batch, warm=True)  # other buffers
    assert len(first) > 100 and first == second
    ours = {call.name for call in first if call.name.startswith("fastfar::")}
    assert bool(ours) == (name == "triton")


def test_graphs_by_level_hold_the_same_ops() -> None:
    with fake_cuda(), torch.inference_mode(), use_backend("triton"):
        step = fake_step(short("mask", (0.0, 0.5, 1.0)), "triton")
        (whole,) = captured(step, 1)
        parts = captured(step, 1, whole=False, warm=True)
    assert len(parts) == len(STEPS) and list(chain(*parts)) == whole


# --- launches --------------------------------------------------------------------------------


def watched_loop(
    steps: int, solver: Solver = PUBLISHED, name: str = "triton", rows: int = 256
) -> Watch:
    """A guided denoising loop; its tables are there already."""
    channels = CONFIG.token_dim
    with fake_cuda(), torch.inference_mode(), use_backend(name):
        head: Any = fake_far(CONFIG, BF16).head_weights
        if name == "triton":
            head = fold_head(head, BF16)
        condition = torch.empty(2 * rows, CONFIG.width, dtype=BF16, device="cuda")
        noise = torch.empty(steps, rows, channels, device="cuda")
        shapes = ((rows, channels), (rows, channels), (channels, channels))
        initial, *moments = (torch.empty(s, device="cuda") for s in ((rows, channels), *shapes))
        for watch in (Watch(None), Watch()):
            with watch:
                denoise_loop(
                    head, condition, 3, initial, noise, guidance_scale=2.0, temperature=0.9,
                    solver=solver, moments=Moments(*moments) if solver.needs_moments else None,
                )  # fmt: skip
    return watch


def loop_launches(steps: int, solver: Solver = PUBLISHED) -> Counter[str]:
    return watched_loop(steps, solver).launches


@BACKENDS
@pytest.mark.parametrize(
    "solver",
    [
        Solver("dpmpp_2m", spacing="log_snr", first_timestep=900, guidance_range=(100, 700)),
        Solver(variance="table", variance_table=((0.1,) * 16, (0.2,) * 16)),
        Solver(variance="closure", start="moments"),
    ],
    ids=["2m", "table", "moments"],
)
def test_other_solvers(solver: Solver, name: str) -> None:
    assert len(watched_loop(2, solver, name).calls) > 30


def test_launches_of_a_diffusion_step() -> None:
    """At depth d 4 d + 1 kernels a step, 2 d of them cuBLAS's, and 3 for each chunk of steps.

    4 steps are one chunk and 16 are two; nothing is copied or cast between the kernels.
    """
    depth, (steps, chunks) = CONFIG.head_depth, (12, 1)
    more = loop_launches(16) - loop_launches(4)
    assert more == Counter(
        {
            "aten::linear": 2 * depth * steps + chunks,
            "fastfar::denoise_activate": chunks,
            "fastfar::denoise_add_silu": depth * steps,
            "fastfar::denoise_gate_layernorm": depth * steps,
            "fastfar::denoise_step": steps + chunks,
        }
    ), more
    assert more.total() == (4 * depth + 1) * steps + 3 * chunks


def test_launches_of_a_guidance_range() -> None:
    """Guidance that is switched twice: two more loops, which start with a copy and with zeros."""
    timesteps = (900, 500, 400, 10)
    more = loop_launches(4, Solver(timesteps=timesteps, guidance_range=(300, 600)))
    more -= loop_launches(4, Solver(timesteps=timesteps))
    names = ("aten::linear", "fastfar::denoise_activate", "fastfar::denoise_step")
    begins = ("aten::to", "aten::zeros_like")
    assert more == Counter(dict.fromkeys((*names, *begins), 2)), more


# --- training --------------------------------------------------------------------------------


def training_step(model: FAR, batch: int, masked: bool) -> Body:
    """Loss and gradients of a batch, with draws that lie on the device already."""
    device, length = model.fake_latent.device, CONFIG.num_tokens
    rows = 2 * batch * length

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    latents, labels = empty(batch, 16, 16, 16), empty(batch, dtype=torch.int64)
    draws = TrainingDraws(
        level=empty(batch, dtype=torch.int64),
        timestep=empty(rows, dtype=torch.int64),
        noise=empty(rows, CONFIG.token_dim),
        mask=empty(batch, length, dtype=torch.bool) if masked else None,
        dropped=empty(batch, dtype=torch.bool),
    )

    def step() -> None:
        loss = diffusion_loss(model, latents, labels, draws, level_weight="sine")
        if loss.requires_grad:
            grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
            assert sum(grad is not None for grad in grads) > 50

    return step


@BACKENDS
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "nomask"])
@pytest.mark.parametrize("device", ["cuda", "meta"])
def test_training_step(
    masked: bool, name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss on fake CUDA tensors, loss and gradients on "meta"."""
    if device == "meta":  # which knows no autocast, not even that it is off
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    streams = []
    on_device = fake_cuda() if device == "cuda" else own_tables()
    with on_device, use_backend(name), torch.set_grad_enabled(device == "meta"):
        for _ in range(2):
            step = training_step(fake_far(CONFIG, torch.float32, device).train(), 3, masked)
            if not streams:
                with Watch(None):
                    step()
            with Watch(device) as watch:
                step()
            streams.append(watch.calls)
    assert len(streams[0]) > 100 and streams[0] == streams[1]


# --- the test of the test --------------------------------------------------------------------


def host_sync(x: Tensor) -> Any:
    return x * x.sum().item()


def dynamic_shape(x: Tensor) -> Any:
    return torch.unique(x)


def host_table(x: Tensor) -> Any:
    return torch.arange(3.0).to(x.device) * x


def host_number(x: Tensor) -> Any:
    return torch.tensor(3.0, device="cuda:0") * x


def other_device(x: Tensor) -> Any:
    return x + torch.ones(3)


def read_back(x: Tensor) -> Any:
    return x.cpu()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (host_sync, "_local_scalar_dense"),
        (dynamic_shape, "_unique2"),
        (host_table, "host"),
        (host_number, "host"),
        (other_device, "host|device"),
        (read_back, "host"),
    ],
)
def test_what_is_forbidden_is_caught(bad: Callable[[Tensor], Any], message: str) -> None:
    caught = (AssertionError, RuntimeError, DataDependentOutputException)
    with fake_cuda():
        x = torch.empty(3, device="cuda")
        with Watch():
            x * 2.0 + 1.0
        with pytest.raises((*caught, DynamicOutputShapeException), match=message), Watch():
            bad(x)


def test_a_table_that_is_copied_each_time_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def uncached(
        size: int, num_levels: int, kind: str, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        with torch.inference_mode(False):
            return levels.filter_matrices(size, num_levels, kind).to(device, dtype)

    monkeypatch.setattr(levels, "filter_table", uncached)
    with fake_cuda(), torch.inference_mode():
        step = fake_step(short("nomask", (0.0, 0.5, 1.0)), "torch")
        with pytest.raises(AssertionError, match="host"):
            captured(step, 1)
