"""fastfar.reference against tensors recorded from the published code and against mathematics."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from formula import formula_tensor
from safetensors import safe_open
from torch import Tensor

from fastfar import reference

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-4
NUM_HEADS = 2
CASES = ("far_tiny_nomask", "far_tiny_mask")
DTYPES = (torch.float32, torch.float64)


def read(name: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return {
            key: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for key, tensor in tensors.items()
        }, file.metadata()


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def relative(out: Tensor, ref: Tensor) -> float:
    assert out.shape == ref.shape
    difference = (out.detach().double() - ref.double()).norm()
    return float(difference / ref.double().norm().clamp(min=1e-30))


def official_plan(mode: str, scale: float, diffusion_steps: int) -> SimpleNamespace:
    """The published schedules (temperature argument 1.0)."""
    mask = mode == "mask"
    levels = (0, 12, 12, 4, 5, 6, 7, 8, 9, 10, 11) if mask else (0, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    n = len(levels)
    rise = [math.cos(math.pi / 2 * (k + 1) / n) for k in range(n)]
    return SimpleNamespace(
        levels=levels,
        input_levels=(None, None if mask else levels[1], *levels[2:]),
        guidance_scales=tuple(1 + (scale - 1) * k / n for k in range(n)),
        temperatures=tuple(
            0.85 + (1.0 - 0.85) * k / n if mask else 0.8 + 0.2 * (1 - rise[k]) for k in range(n)
        ),
        diffusion_steps=(diffusion_steps,) * n,
        mask_ratios=(1.0, *rise[:-1]) if mask else None,
        x0_range=None,
        solvers=[None] * len(levels),
    )


class Recorded:
    """A recorded sampling run: parameters, plan, noise source, tensors of every outer step."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        tensors, meta = read(name, dtype)
        self.params, self.run = under("model.", tensors), under("run.", tensors)
        self.plan = official_plan(meta["mode"], float(meta["cfg"]), int(meta["diffusion_steps"]))
        self.head = under("diffloss.net.", self.params)

    def initial(self, step: int) -> Tensor:
        return self.run["initial_noise"][step]

    def steps(self, step: int, count: int) -> Tensor:
        assert count == self.run["step_noise"].shape[1]
        return self.run["step_noise"][step]

    def order(self) -> Tensor:
        return self.run["order"]

    def mask(self, step: int) -> Tensor | None:
        return self.run["mask"][step] if "mask" in self.run else None


@pytest.fixture(
    scope="module", params=[(n, d) for n in CASES for d in DTYPES], ids=lambda p: f"{p[0]}-{p[1]}"
)
def recorded(request: pytest.FixtureRequest) -> Iterator[Recorded]:
    yield Recorded(*request.param)


def test_condition_teacher_forced(recorded: Recorded) -> None:
    run, params = recorded.run, recorded.params
    labels = torch.cat([run["labels"], torch.full_like(run["labels"], -1)])
    embedding = reference.class_embedding(params, labels)
    for step, tokens in enumerate(run["encoder_input"]):
        mask = recorded.mask(step)
        z = reference.condition(
            params,
            tokens.repeat(2, 1, 1),
            None if mask is None else mask.repeat(2, 1),
            embedding,
            num_heads=NUM_HEADS,
        )
        assert relative(z, run["condition"][step]) < TOLERANCE, step


def test_denoise_loop_teacher_forced(recorded: Recorded) -> None:
    run, plan = recorded.run, recorded.plan
    for step, level in enumerate(plan.levels):
        x_NP = reference.denoise_loop(
            recorded.head,
            run["condition"][step].flatten(0, 1),
            level,
            run["initial_noise"][step],
            run["step_noise"][step],
            guidance_scale=plan.guidance_scales[step],
            temperature=plan.temperatures[step],
        )
        assert relative(x_NP, run["sampled"][step].flatten(0, 1)) < TOLERANCE, step


def test_filter_mask_patchify_teacher_forced(recorded: Recorded) -> None:
    run, plan = recorded.run, recorded.plan
    assert not run["encoder_input"][0].any()
    for step in range(1, len(plan.levels)):
        level = plan.input_levels[step]
        tokens = reference.filter_mask_patchify(
            reference.unpatchify(run["sampled"][step - 1], 1, 16),
            torch.full_like(run["labels"], -1 if level is None else level),
            recorded.mask(step),
            patch_size=1,
            num_levels=16,
        )
        assert relative(tokens, run["encoder_input"][step]) < TOLERANCE, step


def test_masks_of_the_plan() -> None:
    recorded = Recorded("far_tiny_mask", torch.float32)
    for step, ratio in enumerate(recorded.plan.mask_ratios):
        mask = reference.next_mask(recorded.order(), ratio)
        assert torch.equal(mask, recorded.run["mask"][step].bool()), step


def test_sample_latents_free_running(recorded: Recorded) -> None:
    seen: list[Tensor] = []
    latent = reference.sample_latents(
        recorded.params,
        recorded.run["labels"],
        recorded.plan,
        recorded,
        num_heads=NUM_HEADS,
        latent_size=16,
        on_level=lambda step, x: seen.insert(step, x),
    )
    assert latent.dtype == recorded.params["z_proj.weight"].dtype
    assert len(seen) == len(recorded.plan.levels)
    for step, x in enumerate(seen):
        error = relative(reference.patchify(x, 1), recorded.run["sampled"][step])
        assert error < TOLERANCE, step
    assert relative(latent, recorded.run["latent"]) < TOLERANCE


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["masked", "unmasked"])
def test_training_loss_and_gradients(case: str, dtype: torch.dtype) -> None:
    case_tensors = under(f"{case}.", read("far_loss", dtype)[0])
    shapes = {k: tuple(v.shape) for k, v in under("model.", read(CASES[0], dtype)[0]).items()}
    params = {k: formula_tensor(k, s).to(dtype).requires_grad_() for k, s in shapes.items()}
    latent, labels = case_tensors["latent"], case_tensors["labels"]
    level_B = case_tensors["level"].expand(len(labels))

    filtered = reference.low_pass(latent, level_B, num_levels=16)
    assert relative(filtered, case_tensors["filtered"]) < TOLERANCE

    loss = reference.training_loss(
        params,
        latent,
        labels,
        level_B,
        case_tensors["t"],
        case_tensors["noise"],
        case_tensors.get("mask"),
        num_heads=NUM_HEADS,
    )
    assert relative(loss, case_tensors["loss"]) < TOLERANCE
    loss.backward()
    expected = under("grad.", case_tensors)
    assert expected
    for key, gradient in expected.items():
        ours = params[key].grad
        assert ours is not None
        if key == "class_emb.weight":
            ours = ours[labels]
        assert relative(ours, gradient) < TOLERANCE, key


def _denoise(case: Recorded, condition: Tensor, scale: float = 1.0, **kwargs: object) -> Tensor:
    return reference.denoise_loop(
        case.head,
        condition,
        7,
        case.run["initial_noise"][3],
        case.run["step_noise"][3],
        guidance_scale=scale,
        temperature=1.0,
        **kwargs,  # type: ignore[arg-type]
    )


def test_denoise_loop_guidance_and_bounds() -> None:
    case = Recorded("far_tiny_nomask", torch.float64)
    both = case.run["condition"][3].flatten(0, 1)
    rows = both.shape[0] // 2
    plain = _denoise(case, both[:rows], scale=5.0)  # no unconditional half: the scale is not used
    torch.testing.assert_close(_denoise(case, both, scale=1.0), plain)
    assert relative(_denoise(case, both, scale=5.0), plain) > 1e-3
    bounded = _denoise(case, both, scale=3.0, x0_range=(-1.0, 0.5))
    assert bounded.max() <= 0.5 + 1e-9 and bounded.min() >= -1 - 1e-9  # the last step gives x0
    wide = _denoise(case, both, scale=3.0, x0_range=(-1e9, 1e9))
    assert torch.equal(wide, _denoise(case, both, scale=3.0))
    with pytest.raises(ValueError, match="rows"):
        _denoise(case, both[: rows + 1])


def test_denoise_loop_last_noise_is_never_used() -> None:
    case = Recorded("far_tiny_nomask", torch.float64)
    both = case.run["condition"][3].flatten(0, 1)
    before = _denoise(case, both)
    case.run["step_noise"][3, -1] = math.nan
    assert torch.equal(_denoise(case, both), before)


def _hybrid_inputs(timestep: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    output = torch.randn(6, 8, dtype=torch.float64)
    target, noise = torch.randn(2, 6, 4, dtype=torch.float64)
    t_N = torch.full((6,), timestep)
    noised = reference.q_sample(target, noise, t_N, reference.make_schedule())
    return output, target, noise, noised, t_N


@pytest.mark.parametrize("timestep", [0, 1, 500, 999])
def test_hybrid_loss_by_hand(timestep: int) -> None:
    output, target, noise, noised, t_N = _hybrid_inputs(timestep)
    loss = reference.hybrid_loss(output, target, noise, noised, t_N)
    beta = reference.cosine_betas(1000)
    alpha_bar = torch.cumprod(1 - beta, 0)
    t = timestep
    before = alpha_bar[t - 1] if t else torch.ones((), dtype=torch.float64)
    variance = beta[t] * (1 - before) / (1 - alpha_bar[t])
    if t == 0:
        variance = beta[1] * (1 - alpha_bar[0]) / (1 - alpha_bar[1])
    eps, v = output[:, :4], output[:, 4:]
    deviation = torch.exp(0.5 * ((v + 1) / 2 * beta[t].log() + (1 - v) / 2 * variance.log()))
    x0 = (noised - (1 - alpha_bar[t]).sqrt() * eps) / alpha_bar[t].sqrt()

    def mean(clean: Tensor) -> Tensor:
        weighted = beta[t] * before.sqrt() * clean
        weighted = weighted + (1 - before) * (1 - beta[t]).sqrt() * noised
        return weighted / (1 - alpha_bar[t])

    if t == 0:
        cdf = torch.distributions.Normal(mean(x0), deviation).cdf
        mass = cdf(target + 1 / 255) - cdf(target - 1 / 255)
        mass = torch.where(target < -0.999, cdf(target + 1 / 255), mass)
        mass = torch.where(target > 0.999, 1 - cdf(target - 1 / 255), mass)
        bound = -mass.clamp(min=1e-12).log()
    else:
        bound = torch.distributions.kl_divergence(
            torch.distributions.Normal(mean(target), variance.sqrt()),
            torch.distributions.Normal(mean(x0), deviation),
        )
    expected = ((noise - eps) ** 2).mean(1) + bound.mean(1) / math.log(2)
    # At t = 0 the published code approximates the normal distribution function by a tanh (to 3e-4).
    tolerance = 2e-2 if t == 0 else 1e-8
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)


def test_hybrid_loss_gradients_are_separate() -> None:
    output, target, noise, noised, t_N = _hybrid_inputs(300)
    output.requires_grad_()
    reference.hybrid_loss(output, target, noise, noised, t_N).sum().backward()
    assert output.grad is not None
    # Epsilon learns from the squared error only: the bound sees it detached.
    torch.testing.assert_close(output.grad[:, :4], 2 * (output.detach()[:, :4] - noise) / 4)
    assert (output.grad[:, 4:] != 0).all()
    # With a perfect epsilon and v = -1 (posterior variance) the bound and its gradient vanish.
    perfect = torch.cat([noise, -torch.ones_like(noise)], dim=1).requires_grad_()
    loss = reference.hybrid_loss(perfect, target, noise, noised, t_N)
    loss.sum().backward()
    assert perfect.grad is not None
    assert loss.abs().max() < 1e-9 and perfect.grad.abs().max() < 1e-9


def test_level_weight_scales_the_rows_of_an_image() -> None:
    case = Recorded("far_tiny_nomask", torch.float64)
    torch.manual_seed(0)
    draws = (torch.randint(1000, (256,)), torch.randn(256, 16, dtype=torch.float64), None)
    latent = torch.randn(1, 16, 16, 16, dtype=torch.float64)
    arguments = (case.params, latent, torch.tensor([3]), torch.tensor([5]), *draws)
    plain = reference.training_loss(*arguments, num_heads=NUM_HEADS)
    sine = reference.training_loss(*arguments, num_heads=NUM_HEADS, level_weight="sine")
    torch.testing.assert_close(sine, plain * (1 + math.sin(math.pi / 2 * 5 / 16)))
    with pytest.raises(ValueError, match="level_weight"):
        reference.training_loss(*arguments, num_heads=NUM_HEADS, level_weight="cosine")
    with pytest.raises(ValueError, match="255 rows"):
        reference.training_loss(
            *arguments[:4], draws[0][:255], draws[1][:255], None, num_heads=NUM_HEADS
        )
