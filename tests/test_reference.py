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


def test_low_pass_levels() -> None:
    torch.manual_seed(0)
    x_BCHW = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    for kind in ("area_bicubic", "fourier"):
        level_B = torch.tensor([0, 5, 16, -1])
        out = reference.low_pass(x_BCHW, level_B, num_levels=16, kind=kind)
        assert not out[0].any()
        assert relative(out[1], x_BCHW[1]) > 0.1
        assert torch.equal(out[2:], x_BCHW[2:])
    # A constant passes every level of both filters unchanged.
    flat_BCHW = torch.full((16, 1, 16, 16), 2.0, dtype=torch.float64)
    for kind in ("area_bicubic", "fourier"):
        out = reference.low_pass(flat_BCHW, torch.arange(1, 17), num_levels=16, kind=kind)
        torch.testing.assert_close(out, flat_BCHW)
    with pytest.raises(ValueError, match="level is 17"):
        reference.low_pass(x_BCHW[:1], torch.tensor([17]), num_levels=16)
    with pytest.raises(ValueError, match="kind"):
        reference.low_pass(x_BCHW[:1], torch.tensor([1]), num_levels=16, kind="gauss")


def test_formulas_are_the_identity_at_level_f() -> None:
    torch.manual_seed(0)
    x_BCHW = torch.randn(1, 2, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(reference.area_bicubic_filter(x_BCHW, 16, 16), x_BCHW)
    torch.testing.assert_close(reference.fourier_filter(x_BCHW, 16, 16), x_BCHW)


def test_area_bicubic_filter_by_hand() -> None:
    """Level 2 of 4 on a 4 x 4 grid: 2 x 2 means, then bicubic with clamped borders."""
    ramp_H = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    out = reference.area_bicubic_filter(ramp_H.expand(1, 1, 4, 4), 2, 4)[0, 0]
    # The outputs sit at -0.25, 0.25, 0.75, 1.25, the two means (0 and 1) at 0 and 1, Keys' kernel
    # has a = -3/4. `near` holds the weights at distances s and 1-s, `far` those at 1+s and 2-s.
    a, s = -0.75, 0.25
    near = [(a + 2) * d**3 - (a + 3) * d**2 + 1 for d in (s, 1 - s)]
    far = [a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a for d in (1 + s, 2 - s)]
    second = near[1] + far[1]  # samples 1 and 2 (clamped) are 1, samples -1 and 0 are 0
    first = far[0]  # at -0.25 only the sample at 1 (distance 1.25) is not 0
    expected = torch.tensor([first, second, 1 - second, 1 - first], dtype=torch.float64)
    torch.testing.assert_close(out, expected.expand(4, 4))


def test_area_rounds_the_size_up() -> None:
    """Level 3 of 16 on an 8 x 8 grid keeps ceil(1.5) = 2 bands: the same filter as level 4."""
    torch.manual_seed(0)
    x_BCHW = torch.randn(1, 2, 8, 8, dtype=torch.float64)
    third = reference.area_bicubic_filter(x_BCHW, 3, 16)
    assert torch.equal(third, reference.area_bicubic_filter(x_BCHW, 4, 16))
    assert relative(third, reference.area_bicubic_filter(x_BCHW, 2, 16)) > 0.1


@pytest.mark.parametrize("level", range(1, 17))
def test_fourier_filter_keeps_exactly_the_band(level: int) -> None:
    torch.manual_seed(level)
    x_BCHW = torch.randn(1, 1, 16, 16, dtype=torch.float64)
    out = reference.fourier_filter(x_BCHW, level, 16)
    torch.testing.assert_close(reference.fourier_filter(out, level, 16), out)  # idempotent
    before, after = torch.fft.fft2(x_BCHW)[0, 0], torch.fft.fft2(out)[0, 0]
    for row in range(16):
        for column in range(16):
            u, v = min(row, 16 - row), min(column, 16 - column)
            kept = before[row, column] if max(u, v) <= level / 2 else torch.zeros_like(before[0, 0])
            torch.testing.assert_close(after[row, column], kept, atol=1e-10, rtol=1e-10)


def test_patchify_order_and_inverse() -> None:
    x_BCHW = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).reshape(2, 3, 4, 4)
    tokens_BLP = reference.patchify(x_BCHW, 2)
    assert tokens_BLP.shape == (2, 4, 12)
    # Token 1 is the upper right patch; its vector runs over channels, then rows, then columns.
    expected = [x_BCHW[0, c, r, 2 + q] for c in range(3) for r in range(2) for q in range(2)]
    assert torch.equal(tokens_BLP[0, 1], torch.stack(expected))
    assert torch.equal(reference.unpatchify(tokens_BLP, 2, 4), x_BCHW)


def test_filter_mask_patchify_per_image() -> None:
    torch.manual_seed(0)
    x_BCHW = torch.randn(3, 2, 8, 8)
    level_B = torch.tensor([2, 9, -1])
    mask_BL = (torch.rand(3, 16) < 0.5).float()
    tokens = reference.filter_mask_patchify(x_BCHW, level_B, mask_BL, patch_size=2, num_levels=16)
    for b in range(3):
        alone = reference.filter_mask_patchify(
            x_BCHW[b : b + 1], level_B[b : b + 1], None, patch_size=2, num_levels=16
        )[0]
        assert torch.equal(tokens[b], alone * (1 - mask_BL[b]).unsqueeze(-1))


def test_attention_matches_torch() -> None:
    torch.manual_seed(0)
    qkv = torch.randn(2, 5, 3, 4, 8, dtype=torch.float64)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(reference.attention(qkv), theirs)


def test_adaln_mlp_block_by_hand() -> None:
    """With x of standard deviation 1e-3 the eps of the norm, 1e-6, doubles its variance."""
    one = torch.ones(1, 2, dtype=torch.float64)
    eye, zero = torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    x = 1e-3 * torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    out = reference.adaln_mlp_block(
        x, 0.5 * one, 2 * one, 10 * one, one[0], zero, eye, zero, eye, zero
    )
    h = torch.tensor([[1.0, -1.0]], dtype=torch.float64) / math.sqrt(2) * 3 + 0.5
    torch.testing.assert_close(out, x + 10 * h * torch.sigmoid(h))


def test_condition_ignores_values_of_masked_tokens() -> None:
    case = Recorded("far_tiny_mask", torch.float64)
    run = case.run
    embedding = reference.class_embedding(case.params, run["labels"])
    mask = run["mask"][4]
    tokens = run["encoder_input"][4]
    z = reference.condition(case.params, tokens, mask, embedding, num_heads=NUM_HEADS)
    dirty = torch.where(mask.bool().unsqueeze(-1), torch.full_like(tokens, 7.0), tokens)
    assert torch.equal(
        z, reference.condition(case.params, dirty, mask, embedding, num_heads=NUM_HEADS)
    )
    mask = mask.clone()
    mask[0] = 1
    with pytest.raises(ValueError, match="same number"):
        reference.condition(case.params, tokens, mask, embedding, num_heads=NUM_HEADS)


def test_class_embedding_without_class() -> None:
    params = {"class_emb.weight": torch.eye(3), "fake_latent": torch.full((1, 3), 5.0)}
    out = reference.class_embedding(params, torch.tensor([2, -1]))
    assert out.tolist() == [[0, 0, 1], [5, 5, 5]]


def test_timestep_embedding_by_hand() -> None:
    out = reference.timestep_embedding(torch.tensor([3]), 4, torch.float64)[0]
    expected = [math.cos(3), math.cos(0.03), math.sin(3), math.sin(0.03)]
    torch.testing.assert_close(out, torch.tensor(expected, dtype=torch.float64))


def test_space_timesteps_by_hand() -> None:
    assert reference.space_timesteps(1000, 1) == [0]
    assert reference.space_timesteps(1000, 2) == [0, 999]
    assert reference.space_timesteps(1000, 8) == [0, 143, 285, 428, 571, 714, 856, 999]
    assert reference.space_timesteps(6, 3) == [0, 2, 5]  # 2.5 rounds to even
    assert reference.space_timesteps(10, 10) == list(range(10))
    for steps in (25, 40, 70, 100, 1000):
        kept = reference.space_timesteps(1000, steps)
        assert len(set(kept)) == steps and kept[0] == 0 and kept[-1] == 999
    with pytest.raises(ValueError, match="1001"):
        reference.space_timesteps(1000, 1001)


def test_respaced_schedule_by_hand() -> None:
    betas = reference.cosine_betas(1000).tolist()
    bar = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (41, 42)]
    assert betas[41] == pytest.approx(1 - bar[1] / bar[0], rel=1e-9)
    assert betas[-1] == 0.999 and max(betas[:-1]) < 0.999
    alpha_bar = [math.prod(1 - b for b in betas[: t + 1]) for t in (0, 500, 999)]
    schedule = reference.make_schedule(1000, 3)
    assert schedule.timestep.tolist() == [0, 500, 999]
    beta = [1 - alpha_bar[0], 1 - alpha_bar[1] / alpha_bar[0], 1 - alpha_bar[2] / alpha_bar[1]]
    variance = [
        beta[1] * (1 - alpha_bar[0]) / (1 - alpha_bar[1]),
        beta[1] * (1 - alpha_bar[0]) / (1 - alpha_bar[1]),
        beta[2] * (1 - alpha_bar[1]) / (1 - alpha_bar[2]),
    ]

    def double(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    torch.testing.assert_close(schedule.alpha_bar, double(alpha_bar), rtol=1e-9, atol=0)
    torch.testing.assert_close(schedule.log_beta, double(beta).log(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        schedule.posterior_log_variance, double(variance).log(), rtol=1e-9, atol=0
    )
    assert schedule.mean_from_x0[0] == pytest.approx(1.0, abs=1e-9)
    assert schedule.mean_from_x[0] == 0.0


def test_ancestral_step_with_the_true_noise_gives_the_posterior_mean() -> None:
    torch.manual_seed(0)
    schedule = reference.make_schedule(1000, 10)
    target, noise = torch.randn(2, 4, 3, dtype=torch.float64)
    x = reference.q_sample(target, noise, torch.full((4,), 6), schedule)
    step = reference.ancestral_step(noise, torch.zeros_like(x), x, 0 * x, 6, schedule)
    expected = schedule.mean_from_x0[6] * target + schedule.mean_from_x[6] * x
    torch.testing.assert_close(step, expected)
    x = reference.q_sample(target, noise, torch.zeros(4, dtype=torch.int64), schedule)
    step = reference.ancestral_step(noise, torch.zeros_like(x), x, noise, 0, schedule)
    torch.testing.assert_close(step, target)  # the last step: x0 itself, no noise


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
