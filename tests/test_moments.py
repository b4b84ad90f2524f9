"""The moment head: its formula, its files, where it is refused, and what sampling does with it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from formula import fill_by_formula
from tiny_run import tiny_pipeline
from tolerances import relative
from torch import Tensor

from fastfar import FARPipeline, SamplingPlan, sample_latents
from fastfar._weights import open_weights, weights_digest
from fastfar.checkpoint import load_pretrained
from fastfar.graphs import _weights_of
from fastfar.moments import (
    FILE,
    MIN_VARIANCE,
    MomentConfig,
    MomentHead,
    Trained,
    drawn,
    prepared_moments,
)
from fastfar.ops import use_backend
from fastfar.outer_step import OuterStep
from fastfar.solver import Moments, Solver

MOMENTS = Solver(method="moments")
CLOSURE = Solver(variance="closure", start="moments", first_timestep=900)
LABELS = [0, 3, 1]


def tiny_head(pipe: FARPipeline, teacher: str | None = None) -> MomentHead:
    """A head for the tiny pipeline, as if it had been trained with the pipeline's plan."""
    config = pipe.model.config
    digest = weights_digest(open_weights(pipe.model.state_dict())) if teacher is None else teacher
    sizes = MomentConfig(config.token_dim, config.width, config.num_levels, width=16, depth=2)
    head = MomentHead(sizes, Trained(digest, pipe.plan, {"step": 3}))
    fill_by_formula(head)
    head.variance_KP.fill_(0.2)
    bases = torch.randn(head.basis_KPP.shape, dtype=torch.float64)
    head.basis_KPP.copy_(torch.linalg.qr(bases).Q)
    return head.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def pipe() -> FARPipeline:
    torch.manual_seed(0)
    pipe = tiny_pipeline()
    pipe.moments = tiny_head(pipe)
    return pipe


@pytest.fixture
def head(pipe: FARPipeline) -> MomentHead:
    assert pipe.moments is not None
    return pipe.moments


def fast(plan: SamplingPlan, *solvers: Solver, **changes: Any) -> SamplingPlan:
    """The tiny plan with these solvers at its first steps, and one diffusion step at "moments"."""
    chosen = (*solvers, *[Solver()] * (len(plan) - len(solvers)))
    steps = tuple(1 if solver.method == "moments" else 2 for solver in chosen)
    return dataclasses.replace(plan, solvers=chosen, diffusion_steps=steps, **changes)


# --- the function -----------------------------------------------------------------------------


def by_hand(head: MomentHead, z_c: Tensor, z_u: Tensor, level: int, scale: float) -> Moments:
    """The formulas of the module's text, in float64."""
    p = {name: value.double() for name, value in head.state_dict().items()}
    z_c, z_u = z_c.double(), z_u.double()
    h = z_c @ p["condition.weight"].T + p["condition.bias"]
    h = h + z_u @ p["unconditional.weight"].T + p["unconditional.bias"]
    h = h + p["level.weight"][level] + (scale - 1) * p["guidance"]
    for i in range(head.config.depth):
        name = f"blocks.{i}."
        norm = F.layer_norm(h, h.shape[-1:], p[name + "norm.weight"], p[name + "norm.bias"], 1e-6)
        inner = F.gelu(norm @ p[name + "fc1.weight"].T + p[name + "fc1.bias"])
        h = h + inner @ p[name + "fc2.weight"].T + p[name + "fc2.bias"]
    norm = F.layer_norm(h, h.shape[-1:], p["norm.weight"], p["norm.bias"], 1e-6)
    out = norm @ p["output.weight"].T + p["output.bias"]
    shift, log_ratio = out.chunk(2, dim=-1)
    mean = p["mean_KP"][level] + shift @ p["map_KPP"][level].T
    variance = p["variance_KP"][level] * log_ratio.exp() + MIN_VARIANCE
    return Moments(mean, variance, p["basis_KPP"][level])


@pytest.mark.parametrize("scale", [1.0, 1.7])
@pytest.mark.parametrize(
    ("backend", "dtype", "limit"),
    [
        ("torch", torch.float32, 1e-5),
        ("torch", torch.bfloat16, 2e-2),
        ("native", torch.float32, 1e-5),
        ("native", torch.bfloat16, 2e-2),
    ],
)
def test_formula(
    head: MomentHead, backend: str, dtype: torch.dtype, limit: float, scale: float, request: Any
) -> None:
    if backend == "native":
        request.getfixturevalue("library")
    z_c, z_u = torch.randn(2, 7, head.config.condition_width)
    condition = z_c if scale == 1.0 else torch.cat([z_c, z_u])
    with use_backend(backend):
        found = head.prepared(backend, dtype)(condition, 3, scale)
    truth = by_hand(head, z_c, z_c if scale == 1.0 else z_u, 3, scale)
    for one, other in zip(found, truth, strict=True):
        assert one.dtype == torch.float32
        assert relative(one, other) < limit


def test_levels_at_once_are_levels_one_by_one(head: MomentHead) -> None:
    z_c, z_u = torch.randn(2, 3, 5, head.config.condition_width)
    levels, scales = torch.tensor([0, 3, 10]), torch.tensor([1.0, 1.5, 2.0])
    together = head.moments(z_c, z_u, levels, scales[:, None, None])
    for i, (level, scale) in enumerate(zip(levels.tolist(), scales.tolist(), strict=True)):
        alone = head.moments(z_c[i], z_u[i], level, scale)
        for one, other in zip(together, alone, strict=True):
            torch.testing.assert_close(one[i], other)


def test_wrong_width_or_level_is_refused(head: MomentHead) -> None:
    width = head.config.condition_width
    with pytest.raises(ValueError, match="conditions of width"):
        head(torch.zeros(4, width + 1), 3, 1.0)
    with pytest.raises(ValueError, match=r"levels 0\.\.16"):
        head(torch.zeros(4, width), 17, 1.0)
    with pytest.raises(ValueError, match="depth must be a whole number"):
        MomentConfig(4, 32, 16, depth=0)


def test_drawn_tokens_have_these_moments() -> None:
    basis = torch.linalg.qr(torch.randn(3, 3)).Q
    mean, variance = torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([[2.0, 0.1, 0.5]])
    noise = torch.randn(200_000, 3)
    x = drawn(Moments(mean, variance, basis), noise, 0.5)
    expected = 0.25 * basis @ torch.diag(variance[0]) @ basis.T
    torch.testing.assert_close(x.mean(dim=0), mean[0], atol=0.01, rtol=0)
    torch.testing.assert_close(x.T.cov(), expected, atol=0.005, rtol=0)
    bounded = drawn(Moments(mean, variance, basis), noise, 0.5, (-1.0, 1.0))
    assert bounded.min() == -1.0 and bounded.max() == 1.0
    assert torch.equal(drawn(Moments(mean, variance, basis), noise[:1], 0.0), mean)


def test_a_prepared_head_is_kept_until_its_weights_change(pipe: FARPipeline) -> None:
    head = tiny_head(pipe)
    cpu = torch.device("cpu")
    first = prepared_moments(head, "torch", torch.bfloat16, cpu)
    assert prepared_moments(head, "torch", torch.bfloat16, cpu) is first
    assert first.condition.weight.dtype == torch.bfloat16
    assert head.condition.weight.dtype == torch.float32
    head.output.bias.add_(1.0)
    changed = prepared_moments(head, "torch", torch.bfloat16, cpu)
    assert changed is not first and torch.equal(changed.output.bias, head.output.bias)


# --- where it is refused ----------------------------------------------------------------------


def test_what_it_was_trained_for_is_taken(pipe: FARPipeline, head: MomentHead) -> None:
    plan = pipe.plan
    head.check(plan)  # asks for no moments
    head.check(fast(plan, MOMENTS, MOMENTS, CLOSURE), pipe.model.config)
    head.check(fast(plan, MOMENTS, temperatures=(0.5, 0.5, 0.5)))
    without = SamplingPlan(
        levels=(0, 10), input_levels=(None, 10), guidance_scale=2.0, guidance_ramp=(0.0, 1.0),
        temperatures=(1.0, 1.0), diffusion_steps=(1, 1), mask_ratios=(1.0, 0.5),
        x0_range=plan.x0_range, solvers=(MOMENTS, MOMENTS),
    )  # fmt: skip
    head.check(without)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": (0, 4, 10)}, r"at \(level, input level\) \(4, 3\)"),
        ({"input_levels": (None, 5, 10)}, r"at \(level, input level\) \(3, 5\)"),
        ({"guidance_scale": 3.0}, r"guidance scale 2 at level 3.*trained with 1\.5\.\.1\.5"),
        ({"mask_ratios": None}, "mask ratios True, the plan has False"),
        ({"x0_range": None}, "x0 range"),
    ],
)
def test_other_plans_are_refused(
    pipe: FARPipeline, head: MomentHead, changes: dict[str, Any], message: str
) -> None:
    plan = fast(pipe.plan, Solver(), MOMENTS, **changes)
    with pytest.raises(ValueError, match=message):
        head.check(plan)
    # Steps that ask for no moments may be what they like.
    if not {"mask_ratios", "x0_range"} & changes.keys():
        head.check(fast(pipe.plan, MOMENTS, **changes))


def test_sampling_says_what_is_missing(pipe: FARPipeline, head: MomentHead) -> None:
    plan = fast(pipe.plan, MOMENTS)
    with pytest.raises(ValueError, match=r"needs a moment head.*there is none"):
        sample_latents(pipe.model, LABELS, plan, generator=0)
    with pytest.raises(ValueError, match="not trained"):
        sample_latents(pipe.model, LABELS, plan, generator=0, moments=MomentHead(head.config))
    other = MomentHead(dataclasses.replace(head.config, condition_width=8), head.trained)
    with pytest.raises(ValueError, match="for a model with"):
        sample_latents(pipe.model, LABELS, plan, generator=0, moments=other)


# --- sampling ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_back_ends_agree_with_the_reference(
    pipe: FARPipeline, backend: str, request: pytest.FixtureRequest
) -> None:
    if backend == "native":
        request.getfixturevalue("library")
    plan = fast(pipe.plan, MOMENTS, MOMENTS, CLOSURE)

    def run(name: str) -> Tensor:
        return sample_latents(
            pipe.model, LABELS, plan, None, 5, name, torch.float32, moments=pipe.moments
        )

    assert relative(run(backend), run("reference")) < 1e-4


def test_every_level_in_one_call_has_no_denoising_loop(
    pipe: FARPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = fast(pipe.plan, MOMENTS, MOMENTS, MOMENTS, temperatures=(0.0, 0.0, 0.0))

    def loop(*args: Any, **options: Any) -> Tensor:
        raise AssertionError("the denoising MLP was asked")

    monkeypatch.setattr("fastfar.outer_step.denoise_loop", loop)
    # At temperature 0 the noise does not matter; the order of the tokens comes from it, too.
    plan = dataclasses.replace(plan, mask_ratios=(1.0, 0.0, 0.0))
    one, other = (
        sample_latents(pipe.model, LABELS, plan, None, seed, "torch", moments=pipe.moments)
        for seed in (1, 2)
    )
    assert torch.equal(one, other) and one.std() > 0.01


def test_weights_may_be_stored_in_half(pipe: FARPipeline, tmp_path: Path) -> None:
    head = tiny_head(pipe)
    for name, dtype in (("full", torch.float32), ("half", torch.bfloat16)):
        head.save(tmp_path / name, dtype)
    full, half = (MomentHead.load(tmp_path / name) for name in ("full", "half"))
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    assert torch.equal(half.variance_KP, head.variance_KP)
    weight = head.condition.weight
    assert torch.equal(full.condition.weight, weight)
    assert torch.equal(half.condition.weight, weight.to(torch.bfloat16).float())
    assert (tmp_path / "half").stat().st_size < (tmp_path / "full").stat().st_size


def test_a_graph_is_of_one_moment_head(pipe: FARPipeline) -> None:
    plan = fast(pipe.plan, MOMENTS)
    heads = [tiny_head(pipe), tiny_head(pipe), None]
    steps = [
        OuterStep(pipe.model, pipe.model.head_weights, plan, torch.float32, "fixed", head)
        for head in heads
    ]
    assert len({_weights_of(step) for step in steps}) == 3
    before = _weights_of(steps[0])
    assert before == _weights_of(steps[0])
    assert heads[0] is not None
    heads[0].variance_KP.mul_(2.0)
    assert before != _weights_of(steps[0])


# --- files ------------------------------------------------------------------------------------


def test_a_file_holds_all_of_it(pipe: FARPipeline, head: MomentHead, tmp_path: Path) -> None:
    head.save(tmp_path / FILE)
    loaded = MomentHead.load(tmp_path / FILE, head.trained.teacher)
    assert loaded.config == head.config and loaded.trained == head.trained
    assert not loaded.training
    for name, value in head.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    with pytest.raises(ValueError, match="trained for the model with the fingerprint"):
        MomentHead.load(tmp_path / FILE, "0" * 12)


def test_other_files_are_refused(pipe: FARPipeline, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no moment head"):
        MomentHead.load(tmp_path / FILE)
    pipe.model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its format is 'pt', not"):
        MomentHead.load(tmp_path / "model.safetensors")
    (tmp_path / FILE).write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match="no moment head that can be read"):
        MomentHead.load(tmp_path / FILE)


@pytest.mark.parametrize("backend", [None, "native"])
def test_a_pipeline_keeps_its_moment_head(
    pipe: FARPipeline, tmp_path: Path, backend: str | None, request: pytest.FixtureRequest
) -> None:
    if backend == "native":
        request.getfixturevalue("library")
    pipe.save_pretrained(tmp_path)
    loaded = FARPipeline.from_pretrained(tmp_path, torch.float32, backend)
    plan = fast(pipe.plan, MOMENTS, CLOSURE)
    options: dict[str, Any] = {"plan": plan, "generator": 0, "output_type": "latent"}
    options |= {"backend": backend or "torch", "dtype": torch.float32}
    torch.testing.assert_close(loaded(LABELS, **options).images, pipe(LABELS, **options).images)


def test_a_moment_head_of_another_model_is_refused(pipe: FARPipeline, tmp_path: Path) -> None:
    stranger = tiny_head(pipe, teacher="a stranger's")
    with pytest.raises(ValueError, match="a stranger's, this model's is"):
        FARPipeline(pipe.model, None, pipe.plan, None, stranger).save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())
    pipe.model.save_pretrained(tmp_path)
    stranger.save(tmp_path / FILE)
    with pytest.raises(ValueError, match=f"{FILE}: this moment head was trained for the model"):
        load_pretrained(tmp_path)


def test_a_wider_dtype_is_the_same_teacher(pipe: FARPipeline) -> None:
    narrow = {name: value.bfloat16() for name, value in pipe.model.state_dict().items()}
    wide = {name: value.float() for name, value in narrow.items()}
    digest = weights_digest(open_weights(narrow))
    assert digest == weights_digest(open_weights(wide))
    wide["fake_latent"] = wide["fake_latent"] + 1e-3
    assert digest != weights_digest(open_weights(wide))
