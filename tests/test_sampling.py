"""sampling.py: golden runs, batching, guidance, bounds, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import Golden
from tolerances import GOLDEN, relative
from torch import Tensor

import fastfar
from fastfar import (
    FAR,
    FARConfig,
    SamplingPlan,
    SeededNoise,
    TensorNoise,
    backend,
    reference,
    sample_latents,
)
from fastfar.levels import patchify

Read = Callable[[str], Golden]
PLAN = SamplingPlan.official("nomask", diffusion_steps=3).with_changes(x0_range=(-2.0, 2.0))
MASKED = SamplingPlan.official("mask", diffusion_steps=2).with_changes(x0_range=(-2.0, 2.0))
BACKENDS = ("torch", "reference")


def run(model: FAR, labels: object, plan: SamplingPlan = PLAN, **options: object) -> Tensor:
    options = {"dtype": torch.float32, "generator": 0, **options}
    return sample_latents(model, labels, plan, **options)  # type: ignore[arg-type]


# --- golden files ----------------------------------------------------------------------------


@pytest.mark.parametrize("backend_name", BACKENDS)
@pytest.mark.parametrize("name", ["far_tiny_nomask", "far_tiny_mask"])
def test_recorded_runs(name: str, backend_name: str, golden: Read) -> None:
    case = golden(name)
    recorded, meta = case.under("run."), case.meta
    plan = SamplingPlan.official(meta["mode"], float(meta["cfg"]), int(meta["diffusion_steps"]))
    noise = TensorNoise(recorded["initial_noise"], recorded["step_noise"], recorded.get("order"))
    seen: list[Tensor] = []
    latent = run(
        fastfar.load_official(case.under("model."), num_heads=2),
        recorded["labels"],
        plan,
        noise=noise,
        backend=backend_name,
        on_level=lambda step, x: seen.insert(step, x),
    )
    assert len(seen) == len(plan)
    for step, x in enumerate(seen):
        assert relative(patchify(x, 1), recorded["sampled"][step]) < GOLDEN, step
    assert torch.equal(latent, seen[-1])
    assert relative(latent, recorded["latent"]) < GOLDEN


# --- what is computed ------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [PLAN, MASKED], ids=["nomask", "mask"])
def test_float64_equals_the_reference(tiny_model: FAR, plan: SamplingPlan) -> None:
    labels = [0, 4, 2]
    ours, truth = (
        run(tiny_model, labels, plan, dtype=torch.float64, backend=name) for name in BACKENDS
    )
    assert ours.dtype is torch.float64 and relative(ours, truth) < 1e-9


@pytest.mark.parametrize("plan", [PLAN, MASKED], ids=["nomask", "mask"])
def test_one_image_is_the_same_alone_and_in_a_batch(tiny_model: FAR, plan: SamplingPlan) -> None:
    def generators(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    batch = run(tiny_model, [0, 4, 2], plan, generator=generators(7, 8, 9))
    alone = run(tiny_model, [4], plan, generator=generators(8))
    assert relative(batch[1:2], alone) < 2e-5
    assert relative(batch[:1], alone) > 0.1 and relative(batch[2:], alone) > 0.1
    config = tiny_model.config

    def seeded(*keys: tuple[int, int]) -> SeededNoise:
        return SeededNoise(keys, config.num_tokens, config.token_dim)

    batch = run(tiny_model, [0, 4, 2], plan, noise=seeded((1, 0), (1, 1), (1, 2)))
    alone = run(tiny_model, [4], plan, noise=seeded((1, 1)))
    assert relative(batch[1:2], alone) < 2e-5
    assert torch.equal(run(tiny_model, [0, 4, 2], plan, generator=1), batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shape_dtype_and_determinism(tiny_model: FAR, dtype: torch.dtype) -> None:
    before = {k: v.clone() for k, v in tiny_model.state_dict().items()}
    first = run(tiny_model, torch.tensor([1, 3]), MASKED, dtype=dtype, generator=5)
    assert first.shape == (2, 2, 6, 6) and first.dtype is torch.float32
    assert first.isfinite().all() and not first.requires_grad
    assert torch.equal(run(tiny_model, [1, 3], MASKED, dtype=dtype, generator=5), first)
    assert not torch.equal(run(tiny_model, [1, 3], MASKED, dtype=dtype, generator=6), first)
    assert run(tiny_model, 3, dtype=dtype).shape == (1, 2, 6, 6)
    after = tiny_model.state_dict()
    assert all(torch.equal(after[k], v) and after[k].dtype is v.dtype for k, v in before.items())


def test_changed_weights_are_seen(tiny_model: FAR) -> None:
    """The copy kept for another dtype follows the model."""
    first = run(tiny_model, [1], dtype=torch.bfloat16)
    with torch.no_grad():
        tiny_model.class_emb.weight.add_(1.0)
    assert not torch.equal(run(tiny_model, [1], dtype=torch.bfloat16), first)


def test_a_model_made_in_inference_mode(tiny_config: FARConfig) -> None:
    with torch.inference_mode():
        model = FAR(tiny_config)
    assert run(model, [1], dtype=torch.bfloat16).isfinite().all()


def test_dropout_is_off_even_in_train_mode(tiny_model: FAR) -> None:
    expected = run(tiny_model, [1, 2])
    assert torch.equal(run(tiny_model.train(), [1, 2]), expected)
    assert tiny_model.training


def test_autocast_around_the_call_changes_nothing(tiny_model: FAR) -> None:
    """The compute dtype is the argument's: float32 is parity mode wherever it is asked for."""
    plan = SamplingPlan.official("nomask", diffusion_steps=2).with_changes(x0_range=(-3.0, 3.0))

    def sample() -> Tensor:
        return sample_latents(
            tiny_model, [1], plan, generator=0, backend="torch", dtype=torch.float32
        )

    expected = sample()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sample(), expected)


def test_guidance_one_skips_the_unconditional_half(tiny_model: FAR) -> None:
    rows: list[int] = []
    tiny_model.z_proj_ln.register_forward_hook(lambda m, args, out: rows.append(len(out)))
    unguided = PLAN.with_changes(guidance_scale=1.0)
    ours = run(tiny_model, [0, 4], unguided)
    assert rows == [2] * len(unguided)
    rows.clear()
    run(tiny_model, [0, 4], PLAN)
    assert rows == [2] + [4] * (len(PLAN) - 1), "the ramp starts without guidance"
    assert relative(ours, run(tiny_model, [0, 4], unguided, backend="reference")) < GOLDEN
    with torch.no_grad():
        tiny_model.fake_latent.fill_(float("nan"))
    assert torch.equal(run(tiny_model, [0, 4], unguided), ours)


@pytest.mark.parametrize("plan", [PLAN, MASKED], ids=["nomask", "mask"])
@pytest.mark.parametrize("guided", [False, True], ids=["ramp", "constant guidance"])
def test_the_first_step_sees_each_class_once(
    tiny_model: FAR, plan: SamplingPlan, guided: bool
) -> None:
    rows: list[int] = []
    tiny_model.z_proj_ln.register_forward_hook(lambda m, args, out: rows.append(len(out)))
    if guided:
        plan = plan.with_changes(guidance_ramp=(1.0,) * len(plan))
    labels = [4, 0, 4, 4, 2]
    ours = run(tiny_model, labels, plan, dtype=torch.float64, backend="torch")
    assert rows == [3 + guided] + [2 * len(labels)] * (len(plan) - 1)
    truth = run(tiny_model, labels, plan, dtype=torch.float64, backend="reference")
    assert relative(ours, truth) < 1e-9


@pytest.mark.parametrize("backend_name", BACKENDS)
def test_x0_range_is_respected_at_every_level(tiny_model: FAR, backend_name: str) -> None:
    seen: list[Tensor] = []
    plan = PLAN.with_changes(x0_range=(-0.25, 0.5))
    run(tiny_model, [0, 4], plan, backend=backend_name, on_level=lambda k, x: seen.append(x))
    assert len(seen) == len(plan)
    for x in seen:
        assert x.min() >= -0.25 - 1e-6 and x.max() <= 0.5 + 1e-6
    assert run(tiny_model, [0, 4], PLAN.with_changes(x0_range=None)).abs().max() > 10


def test_steps_may_differ_from_level_to_level(tiny_model: FAR) -> None:
    plan = PLAN.with_changes(diffusion_steps=tuple(range(1, len(PLAN) + 1)))
    ours, truth = (
        run(tiny_model, [3], plan, dtype=torch.float64, backend=name) for name in BACKENDS
    )
    assert relative(ours, truth) < 1e-9


def test_input_levels_filter_what_the_model_sees(tiny_model: FAR) -> None:
    """The input of step k is the result of step k - 1, low-passed to that level."""
    inputs: list[Tensor] = []
    results: list[Tensor] = []
    tiny_model.z_proj.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    plan = PLAN.with_changes(guidance_scale=1.0, input_levels=(None, None, *PLAN.levels[2:]))
    run(tiny_model, [0, 4], plan, on_level=lambda k, x: results.append(x))
    assert not inputs[0].any()
    for k in range(1, len(plan)):
        level = plan.input_levels[k]
        expected = reference.filter_mask_patchify(
            results[k - 1],
            torch.full((2,), -1 if level is None else level),
            patch_size=2,
            num_levels=16,
        )
        assert relative(inputs[k], expected) < 1e-6, k


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [[5], [-1], [0, 99], torch.tensor([2, 5]), -1], ids=str)
def test_labels_out_of_range(tiny_model: FAR, labels: object) -> None:
    with pytest.raises(ValueError, match=r"0\.\.4"):
        run(tiny_model, labels)


@pytest.mark.parametrize("labels", [[], torch.zeros(0, dtype=torch.int64)], ids=["list", "tensor"])
def test_no_labels(tiny_model: FAR, labels: object) -> None:
    with pytest.raises(ValueError, match="empty"):
        run(tiny_model, labels)


@pytest.mark.parametrize("labels", [[1.0], torch.tensor([0.5]), [True, False], 1.0, [1j]], ids=str)
def test_labels_of_the_wrong_type(tiny_model: FAR, labels: object) -> None:
    with pytest.raises(TypeError, match="whole numbers"):
        run(tiny_model, labels)


def test_labels_of_the_wrong_shape(tiny_model: FAR) -> None:
    with pytest.raises(ValueError, match="one-dimensional"):
        run(tiny_model, [[0, 1]])


def test_plans_that_do_not_fit(tiny_model: FAR) -> None:
    with pytest.raises(TypeError, match="SamplingPlan"):
        run(tiny_model, [0], {"levels": (0, 1)})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"17.*levels 0\.\.16"):
        run(tiny_model, [0], PLAN.with_changes(levels=(*PLAN.levels[:-1], 17)))
    with pytest.raises(ValueError, match="rise"):
        PLAN.with_changes(levels=(0, *PLAN.levels[:0:-1]))
    for steps in (0, -1):
        with pytest.raises(ValueError, match="diffusion_steps"):
            PLAN.with_changes(diffusion_steps=steps)
    for scale in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="guidance_scale"):
            PLAN.with_changes(guidance_scale=scale)


def tensor_noise(rows: int = 9, numbers: int = 8, outer: int = 11, steps: int = 3) -> TensorNoise:
    return TensorNoise(
        torch.randn(outer, rows, numbers), torch.randn(outer, steps, rows, numbers)
    )


@pytest.mark.parametrize("backend_name", BACKENDS)
@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"rows": 10}, r"initial\(0\) has shape \(10, 8\), this run needs \(9, 8\)"),
        ({"rows": 18}, r"this run needs \(9, 8\)"),
        ({"numbers": 16}, r"this run needs \(9, 8\)"),
        ({"outer": 4}, "no noise for outer step 4"),
        ({"steps": 2}, "needs noise for 3 diffusion steps"),
    ],
    ids=str,
)
def test_noise_of_the_wrong_shape(
    tiny_model: FAR, sizes: dict[str, int], message: str, backend_name: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tiny_model, [0], noise=tensor_noise(**sizes), backend=backend_name)


def test_a_masked_plan_needs_an_order(tiny_model: FAR) -> None:
    with pytest.raises(ValueError, match="order"):
        run(tiny_model, [0], MASKED, noise=tensor_noise())


@pytest.mark.parametrize("count", [0, 1, 3])
def test_generators_of_the_wrong_number(tiny_model: FAR, count: int) -> None:
    generators = [torch.Generator() for _ in range(count)]
    with pytest.raises(ValueError, match=f"{count} generators for 2 images"):
        run(tiny_model, [0, 1], generator=generators)


def test_back_ends_and_dtypes_that_are_not_there(
    tiny_model: FAR, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="tensorflow"):
        run(tiny_model, [0], backend="tensorflow")
    states = {"reference": None, "torch": None, "native": "not built", "triton": "no CUDA device"}
    monkeypatch.setattr(backend, "backends", lambda: states)
    for name in ("native", "triton"):
        with pytest.raises(ValueError, match=str(states[name])):
            run(tiny_model, [0], backend=name)
    for dtype in (torch.int64, torch.complex64):
        with pytest.raises(ValueError, match="dtype"):
            run(tiny_model, [0], dtype=dtype)
