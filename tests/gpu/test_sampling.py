"""Whole images on the GPU: the published code's recorded runs, memory, the command."""

from __future__ import annotations

import gc
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Captured, picture
from conftest import Golden
from tiny_far import tiny_model
from tolerances import FACTOR, GOLDEN, relative

import fastfar
from fastfar import FAR, FARConfig, SamplingPlan, TensorNoise, cli, graphs, sample_latents
from fastfar.bench.cases import head_inputs
from fastfar.levels import patchify
from fastfar.ops._denoise_triton import denoise
from fastfar.ops._folded_head import fold_head
from fastfar.solver import Solver

Read = Callable[[str], Golden]
BOUNDED = SamplingPlan.official("mask", guidance_scale=2.0, diffusion_steps=2).with_changes(
    x0_range=(-3.0, 3.0)
)


@dataclass(frozen=True)
class Run:
    """Where an image is sampled: Triton's kernels on the GPU.

    On a CPU PyTorch's, so that these tests have been run: the interpreter would take minutes, and
    tests/triton samples an image with it.
    """

    device: torch.device
    backend: str

    def __call__(self, model: FAR, labels: Any, plan: SamplingPlan, **options: Any) -> torch.Tensor:
        options = {"dtype": torch.float32, **options}
        return sample_latents(model, labels, plan, backend=self.backend, **options)


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
def run(request: pytest.FixtureRequest) -> Run:
    device = torch.device(request.param)
    return Run(device, "triton" if device.type == "cuda" else "torch")


def model_on(device: torch.device) -> FAR:
    """Small, and with a variance channel that stays near -1..1, as a trained head's does."""
    model = tiny_model()
    with torch.no_grad():
        model.head.final_layer.linear.weight.mul_(0.1)
    return model.to(device)


# --- the published code's runs ---------------------------------------------------------------


@pytest.mark.parametrize("by_level", [True, False], ids=["by level", "whole"])
@pytest.mark.parametrize("name", ["far_tiny_nomask", "far_tiny_mask"])
def test_recorded_runs(name: str, by_level: bool, run: Run, golden: Read) -> None:
    """float32 is parity mode: 1e-4 of what the published code computed, at every outer step."""
    case = golden(name)
    recorded, meta = case.under("run."), case.meta
    plan = SamplingPlan.official(meta["mode"], float(meta["cfg"]), int(meta["diffusion_steps"]))
    noise = TensorNoise(recorded["initial_noise"], recorded["step_noise"], recorded.get("order"))
    model = fastfar.load_official(case.under("model."), num_heads=2).to(run.device)
    seen: list[torch.Tensor] = []
    on_level = (lambda step, x: seen.insert(step, x)) if by_level else None
    latent = run(model, recorded["labels"], plan, noise=noise, on_level=on_level)
    assert latent.device.type == run.device.type
    for step, x in enumerate(seen):
        assert relative(patchify(x, 1).cpu(), recorded["sampled"][step]) < GOLDEN, step
    assert len(seen) == (len(plan) if by_level else 0)
    assert relative(latent.cpu(), recorded["latent"]) < GOLDEN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["nomask", "mask"])
def test_not_further_from_float64_than_pytorch(mode: str, dtype: torch.dtype, run: Run) -> None:
    """The exact mode: FAR-B with random weights, five diffusion steps."""
    on_gpu = run.device.type == "cuda"
    if not on_gpu and (mode, dtype) != ("mask", torch.float32):
        pytest.skip("PyTorch against itself once is enough")
    model = FAR(FARConfig.preset("far_base")).eval() if on_gpu else tiny_model()
    with torch.no_grad():  # an untrained model has gates of zero, a checkpoint has not
        for name, parameter in model.head.named_parameters():
            if "adaLN" in name or "final_layer" in name:
                parameter.normal_(std=0.02)
    model = model.to(run.device)
    plan = SamplingPlan.official(mode, guidance_scale=3.0, diffusion_steps=5 if on_gpu else 1)
    plan = plan.with_changes(x0_range=(-3.0, 3.0))
    plain = Run(run.device, "torch")
    ours, theirs = [], []
    for seed in range(3 if on_gpu else 1):  # ten levels of random weights multiply one's luck
        truth = plain(model, [3, 7], plan, generator=seed, dtype=torch.float64)
        for errors, way in ((ours, run), (theirs, plain)):
            errors.append(relative(way(model, [3, 7], plan, generator=seed, dtype=dtype), truth))
    floor = GOLDEN if dtype is torch.float32 else 1e-2
    assert statistics.median(ours) <= FACTOR * max(theirs) + floor, (ours, theirs)


def test_other_solvers(run: Run) -> None:
    """Each of them at some outer step, guided at some timesteps alone; from a graph, twice."""
    solvers = (
        Solver("dpmpp_2m", spacing="log_snr", first_timestep=900, guidance_range=(50, 999)),
        Solver("sde_dpmpp_2m", timesteps=(900, 500, 100), guidance_range=(300, 600)),
        Solver(variance="linear"),
        Solver(variance="table", variance_table=((0.2,), (0.5,), (0.9,))),
        Solver("ddim"),
    )
    plan = BOUNDED.with_changes(
        diffusion_steps=3, solvers=tuple(solvers[k % 5] for k in range(len(BOUNDED)))
    )
    model, plain = model_on(run.device), Run(run.device, "torch")
    truth = plain(model, [3, 7], plan, generator=0, dtype=torch.float64)
    theirs = relative(plain(model, [3, 7], plan, generator=0), truth)
    for _ in range(2):
        ours = relative(run(model, [3, 7], plan, generator=0), truth)
        assert ours <= FACTOR * theirs + GOLDEN, (ours, theirs)


# --- the loop's own choices ------------------------------------------------------------------


def test_chunks_change_nothing(device: torch.device) -> None:
    """Chunks of any length give the same numbers, and each repeats bit by bit."""
    on_gpu = device.type == "cuda"
    config = FARConfig.preset("far_base") if on_gpu else tiny_model().config
    tokens, steps = (256, 11) if on_gpu else (5, 2)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    (head, condition, level, initial, noise), options = head_inputs(
        config, tokens, steps, torch.float32
    )
    folded = fold_head({name: x.to(device) for name, x in head.items()}, dtype)
    condition, initial, noise = condition.to(device, dtype), initial.to(device), noise.to(device)

    def loop(chunk: int) -> torch.Tensor:
        return denoise(
            folded, condition, level, initial, noise, chunk=chunk, num_timesteps=1000,
            **options,
        )  # fmt: skip

    expected = loop(1)
    assert bool(expected.isfinite().all())
    for chunk in (1, 3, steps) if on_gpu else (2,):
        single = loop(chunk)
        assert relative(single, expected) < 1e-3
        for _ in range(20 if on_gpu else 1):  # a race shows now and then
            assert torch.equal(loop(chunk), single)


def test_repeats_and_batches(run: Run) -> None:
    """Bit-equal repeats, with a graph and without; one image alone as in a batch."""
    model = model_on(run.device)

    def sample(labels: list[int], seeds: list[int]) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return run(model, labels, BOUNDED, generator=generators)

    both = sample([1, 7], [3, 4])
    assert torch.equal(sample([1, 7], [3, 4]), both)
    with graphs.disabled():
        assert relative(sample([1, 7], [3, 4]), both) < 1e-5
    assert relative(sample([7], [4]), both[1:]) < GOLDEN
    other = sample([2, 7], [5, 4])
    assert relative(other[1:], both[1:]) < 1e-5 and relative(other[:1], both[:1]) > 0.1


def test_memory_does_not_grow(run: Run) -> None:
    """A hundred replays of a captured image, with new labels and noise."""
    model = model_on(run.device)
    on_gpu = run.device.type == "cuda"

    def sample(seed: int) -> None:
        labels = [seed % 10, (seed + 1) % 10]
        run(model, labels, BOUNDED, generator=seed, dtype=torch.bfloat16 if on_gpu else None)

    def memory() -> tuple[int, int]:
        if not on_gpu:
            return 0, 0
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    for seed in range(3):
        sample(seed)
    gc.collect()  # what earlier tests left
    before = memory()
    for seed in range(100 if on_gpu else 1):
        sample(seed)
    assert memory() == before


# --- the command -----------------------------------------------------------------------------


def test_the_command(run: Run, tmp_path: Path, capsys: Captured) -> None:
    """`fastfar sample` on the device draws what PyTorch draws on the CPU."""
    pictures = []
    for device, backend in ((run.device.type, run.backend), ("cpu", "torch")):
        output = tmp_path / f"{len(pictures)}.png"
        steps = "4" if run.device.type == "cuda" else "1"
        arguments = ["--classes", "0,1", "--diffusion-steps", steps, "--dtype", "float32"]
        arguments += ["--device", device, "--backend", backend, "--output", str(output)]
        assert cli.main(["sample", *arguments, "--quiet", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["backend"], found["device"], found["count"]) == (backend, device, 2)
        pictures.append(picture(output).astype(float))
    ours, expected = pictures
    assert expected.std() > 5
    assert abs(ours - expected).mean() < 1.0
