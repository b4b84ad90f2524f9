"""Sampling on the native back end: golden runs on every instruction set, accuracy, determinism."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import Golden
from formula import fill_by_formula
from tolerances import FACTOR, FLOOR, GOLDEN, relative
from torch import Tensor

import fastfar
from fastfar import FAR, FARConfig, SamplingPlan, SeededNoise, TensorNoise, sample_latents, sampling
from fastfar.levels import patchify
from fastfar.prepared import PreparedFAR, prepare_native

Read = Callable[[str], Golden]
# x0 is not bounded: a bound cuts errors off, or makes large ones of small ones.
PLANS = {
    name: SamplingPlan(
        levels=(0, 3, 8, 11),
        input_levels=(None, 3, None, 11),
        guidance_scale=3.0,
        guidance_ramp=(0.0, 0.2, 0.5, 1.0),
        temperatures=(0.8, 1.0, 1.1, 0.9),
        diffusion_steps=(3, 2, 1, 5),
        mask_ratios=ratios,
    )
    for name, ratios in {"nomask": None, "mask": (1.0, 0.9, 0.5, 0.0)}.items()
}
DTYPES = (torch.float32, torch.bfloat16)

pytestmark = pytest.mark.usefixtures("library")


@pytest.fixture(params=PLANS)
def plan(request: pytest.FixtureRequest) -> SamplingPlan:
    return PLANS[request.param]


@pytest.fixture
def model(tiny_config: FARConfig) -> FAR:
    """The small and odd one of every test, with a head that the kernels take; well conditioned."""
    model = FAR(dataclasses.replace(tiny_config, head_width=48)).eval()
    fill_by_formula(model)
    with torch.no_grad():
        model.head.final_layer.linear.weight.mul_(0.2)
        model.head.final_layer.linear.bias.mul_(0.2)
    return model


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(model: FAR, labels: list[int], plan: SamplingPlan, **options: Any) -> Tensor:
    options = {"backend": "native", "dtype": torch.float32, "generator": 0, **options}
    return sample_latents(model, labels, plan, **options)


# --- accuracy ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["far_tiny_nomask", "far_tiny_mask"])
def test_recorded_runs(name: str, isa: str, golden: Read) -> None:
    case = golden(name)
    recorded, meta = case.under("run."), case.meta
    plan = SamplingPlan.official(meta["mode"], float(meta["cfg"]), int(meta["diffusion_steps"]))
    model = fastfar.load_official(
        case.under("model."), num_heads=2, dtype=torch.float32, backend="native"
    )
    seen: list[Tensor] = []
    latent = run(
        model,
        recorded["labels"],  # type: ignore[arg-type]
        plan,
        noise=TensorNoise(recorded["initial_noise"], recorded["step_noise"], recorded.get("order")),
        on_level=lambda step, x: seen.append(x),
    )
    for step, x in enumerate(seen):
        assert relative(patchify(x, 1), recorded["sampled"][step]) < GOLDEN, step
    assert len(seen) == len(plan) and relative(latent, recorded["latent"]) < GOLDEN


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_twice_that_of_pytorch(
    model: FAR, plan: SamplingPlan, dtype: torch.dtype, isa: str
) -> None:
    labels = [0, 4, 2, 0, 1]
    truth = run(model, labels, plan, backend="reference", dtype=torch.float64)
    allowed = relative(run(model, labels, plan, backend="torch", dtype=dtype), truth)
    latent = run(model, labels, plan, dtype=dtype)
    assert latent.dtype is torch.float32
    assert 0 < relative(latent, truth) <= FACTOR * allowed + len(plan) * FLOOR[dtype]


def test_auto_is_native(model: FAR, plan: SamplingPlan) -> None:
    expected = run(model, [1, 2], plan)
    assert torch.equal(run(model, [1, 2], plan, backend="auto"), expected)
    assert not torch.equal(run(model, [1, 2], plan, backend="torch"), expected)


def test_every_op_runs_native(
    model: FAR, plan: SamplingPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "layernorm_attention_residual",
        "layernorm_linear",
        "layernorm_mlp_residual",
        "denoise_loop",
        "filter_mask_patchify",
    ):
        operation = getattr(fastfar.ops, name)
        monkeypatch.setitem(operation.implementations, "torch", None)
    assert run(model, [0, 3], plan).isfinite().all()


# --- what repeats -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("threads")
def test_every_bit_repeats_on_any_number_of_threads(
    model: FAR, plan: SamplingPlan, dtype: torch.dtype, isa: str
) -> None:
    expected = run(model, [0, 4, 2], plan, dtype=dtype)
    assert torch.equal(run(model, [0, 4, 2], plan, dtype=dtype), expected)
    assert not torch.equal(run(model, [0, 4, 2], plan, dtype=dtype, generator=1), expected)
    for count in (2, 3, 4):
        torch.set_num_threads(count)
        assert torch.equal(run(model, [0, 4, 2], plan, dtype=dtype), expected), count


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_image_is_the_same_alone_and_in_a_batch(
    model: FAR, plan: SamplingPlan, dtype: torch.dtype
) -> None:
    def seeded(*keys: tuple[int, int]) -> SeededNoise:
        return SeededNoise(keys, model.config.num_tokens, model.config.token_dim)

    labels, keys = [0, 4, 2, 4], [(1, 0), (1, 1), (1, 2), (1, 3)]
    batch = run(model, labels, plan, noise=seeded(*keys), dtype=dtype)
    for row, (label, key) in enumerate(zip(labels, keys, strict=True)):
        alone = run(model, [label], plan, noise=seeded(key), dtype=dtype)
        assert relative(batch[row : row + 1], alone) < 2e-5
    assert relative(batch[1], batch[3]) > 0.1  # equal classes, different noise


def test_random_numbers_are_those_of_the_other_back_ends(model: FAR, plan: SamplingPlan) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    states = [generator.get_state() for generator in generators]
    for generator in (5, generators):
        ours = run(model, [1, 3], plan, generator=generator)
        ends = [each.get_state() for each in generators]
        for each, state in zip(generators, states, strict=True):
            each.set_state(state)
        theirs = run(model, [1, 3], plan, generator=generator, backend="torch")
        assert relative(ours, theirs) < GOLDEN
        for each, end in zip(generators, ends, strict=True):
            assert torch.equal(each.get_state(), end)


def test_several_python_threads_sample_at_once(model: FAR, plan: SamplingPlan) -> None:
    """The same model in both dtypes: the packed copy changes under the others' feet."""
    jobs = [(seed, DTYPES[seed % 2]) for seed in range(6)]
    expected = [run(model, [seed % 5, 1], plan, generator=seed, dtype=d) for seed, d in jobs]
    found: dict[int, list[Tensor]] = {}
    start = threading.Barrier(len(jobs))

    def work(seed: int, dtype: torch.dtype) -> None:
        start.wait()
        found[seed] = [
            run(model, [seed % 5, 1], plan, generator=seed, dtype=dtype) for _ in range(3)
        ]

    workers = [threading.Thread(target=work, args=job) for job in jobs]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == len(jobs)
    for seed, _ in jobs:
        assert all(torch.equal(latent, expected[seed]) for latent in found[seed]), seed


# --- the packed copy --------------------------------------------------------------------------


def test_packed_once_and_again_when_weights_change(
    model: FAR, plan: SamplingPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[torch.dtype] = []

    def counted(model: FAR, dtype: torch.dtype) -> PreparedFAR:
        made.append(dtype)
        return prepare_native(model, dtype)

    monkeypatch.setattr(sampling, "prepare_native", counted)
    first = run(model, [1], plan)
    assert torch.equal(run(model, [1], plan), first) and len(made) == 1
    with torch.no_grad():
        model.encoder_blocks[0].mlp.fc1.weight.mul_(2.0)  # type: ignore[operator, union-attr]
    changed = run(model, [1], plan)
    assert not torch.equal(changed, first) and len(made) == 2
    run(model, [1], plan, dtype=torch.bfloat16)
    assert made == [torch.float32, torch.float32, torch.bfloat16]
    assert torch.equal(run(model.train(), [1], plan), changed) and model.training


def test_a_model_made_in_inference_mode(tiny_config: FARConfig, plan: SamplingPlan) -> None:
    with torch.inference_mode():
        model = FAR(dataclasses.replace(tiny_config, head_width=16)).eval()
        inside = run(model, [1], plan)
    assert torch.equal(run(model, [1], plan), inside)


def test_dtypes_that_it_does_not_have(model: FAR, plan: SamplingPlan) -> None:
    for dtype in (torch.float16, torch.float64):
        with pytest.raises(ValueError, match=r"native.*float32 or bfloat16, not in torch\."):
            run(model, [0], plan, dtype=dtype)
        assert run(model, [0], plan, dtype=dtype, backend="auto").shape == (1, 2, 6, 6)  # torch
