"""The formulas of fastfar.reference against mathematics and hand-computed values."""

from __future__ import annotations

import math

import pytest
import torch
from test_reference import NUM_HEADS, Recorded, relative
from torch import Tensor

from fastfar import reference


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
