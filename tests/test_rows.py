"""rows.py: which tokens the head computes in masked sampling, and that nothing sees the others."""

from __future__ import annotations

import copy
import dataclasses
from itertools import combinations
from typing import Any

import pytest
import torch
from formula import fill_by_formula
from tiny_run import tiny_pipeline
from tolerances import FACTOR, FLOOR, relative
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastfar import FAR, FARConfig, SamplingPlan, outer_step, sample_latents, sampling
from fastfar.costs import counts
from fastfar.levels import footprint, low_pass, patchify, unpatchify
from fastfar.ops import filter_mask_patchify
from fastfar.outer_step import OuterStep
from fastfar.rows import mean_rows, seen_rows

# For 100 tokens, so that a filter does not spread each of them over all others.
PLAN = SamplingPlan(
    levels=(0, 14, 11, 13, 15),
    input_levels=(None, None, 11, 14, 15),
    guidance_scale=2.0,
    guidance_ramp=(0.0, 0.5, 1.0, 0.0, 1.0),
    temperatures=(0.8, 1.0, 0.9, 1.0, 1.0),
    diffusion_steps=(2, 1, 3, 1, 2),
    mask_ratios=(1.0, 0.97, 0.93, 0.9, 0.0),
)
LABELS = [0, 4, 0]
BATCH = len(LABELS)


@pytest.fixture(scope="module")
def config() -> FARConfig:
    return FARConfig(
        width=24, encoder_depth=1, decoder_depth=1, num_heads=3, head_depth=1, head_width=48,
        latent_channels=1, latent_size=20, patch_size=2, buffer_size=2, num_classes=5,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(config: FARConfig) -> FAR:
    return made(config)


def made(config: FARConfig) -> FAR:
    model = FAR(config).eval()
    fill_by_formula(model)
    with torch.no_grad():  # a variance channel far outside [-1, 1] would overflow
        model.head.final_layer.linear.weight.mul_(0.2)
    return model


def order(config: FARConfig, batch: int = BATCH, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, config.num_tokens, generator=generator).argsort(dim=1)


def run(model: FAR, labels: list[int] = LABELS, **options: Any) -> Tensor:
    options = {"plan": PLAN, "generator": 3, "backend": "torch", "dtype": torch.float64, **options}
    return sample_latents(model, labels, **options)


# --- footprint -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["area_bicubic", "fourier"])
@pytest.mark.parametrize("size, patch", [(10, 1), (12, 2), (6, 3), (5, 5)])
def test_footprint_is_what_a_change_of_a_token_reaches(size: int, patch: int, kind: str) -> None:
    length = (size // patch) ** 2
    # Different numbers in a token, one token at a time: (L, L, P), image j has token j.
    one_LLP = torch.eye(length, dtype=torch.float64)[..., None] * (1.0 + torch.rand(patch**2))
    for level in range(17):
        out = low_pass(
            unpatchify(one_LLP, patch), torch.full((length,), level), num_levels=16, kind=kind
        )
        reached_LL = (patchify(out, patch) != 0).any(dim=2)
        expected = footprint(level, size, patch, 16, kind)
        assert not (reached_LL.T & ~expected).any(), level
        # A sum that happens to vanish is none of the filter's doing.
        assert (reached_LL.T | ~expected).float().mean() > 0.9, level


def test_footprints_that_can_be_told() -> None:
    assert not footprint(0, 8, 2, 16).any()
    assert torch.equal(footprint(16, 8, 2, 16), torch.eye(16, dtype=torch.bool))
    assert footprint(2, 8, 2, 16).all(), "one number, everywhere"
    partial = footprint(11, 20, 2, 16)
    assert 0.1 < partial.float().mean() < 0.6 and bool(partial.diagonal().all())


# --- selection -------------------------------------------------------------------------------


def test_tokens_of_an_unfiltered_result_are_the_visible_ones(config: FARConfig) -> None:
    order_BL = order(config)
    for level in (None, 16):
        plan = PLAN.with_changes(input_levels=(None, level, 11, 14, 15))
        for rows in ("fixed", "seen"):
            found = seen_rows(plan, 0, config, order_BL, rows)
            expected = {b * 100 + int(i) for b in range(BATCH) for i in order_BL[b, 97:]}
            assert found is not None and len(found) == BATCH * 3
            assert set(found.tolist()) == expected


@pytest.mark.parametrize("k", [1, 2])
def test_tokens_of_a_filtered_result_are_all_that_matter_and_no_more(
    config: FARConfig, k: int
) -> None:
    """By brute force: which tokens, made NaN, make a visible token NaN."""
    order_BL = order(config)
    masked = PLAN.num_masked(k + 1, 100)
    level = PLAN.input_levels[k + 1]
    assert level is not None and seen_rows(PLAN, k, config, order_BL, "fixed") is None
    found = seen_rows(PLAN, k, config, order_BL)
    assert found is not None and BATCH * (100 - masked) < len(found) < BATCH * 90
    matter = []
    for b in range(BATCH):
        ones_LLP = torch.eye(100)[..., None].expand(-1, -1, 4)
        tokens = filter_mask_patchify(
            unpatchify(ones_LLP, 2), torch.full((100,), level), patch_size=2, num_levels=16
        )
        visible = tokens[:, order_BL[b, masked:]]
        matter += [100 * b + i for i in range(100) if bool(visible[i].any())]
    assert found.tolist() == matter


def test_where_all_rows_are_needed(config: FARConfig) -> None:
    order_BL = order(config)
    for k in range(3):
        assert seen_rows(PLAN, k, config, order_BL, "all") is None
        assert seen_rows(PLAN, k, config, None) is None
    for k in (3, 4):  # nothing is masked next; the last step
        assert seen_rows(PLAN, k, config, order_BL) is None


def test_mean_rows_is_the_mean_over_all_orders() -> None:
    config = FARConfig(latent_channels=1, latent_size=6, num_levels=8, width=24, num_heads=3)
    plan = PLAN.with_changes(
        levels=(0, 7), input_levels=(None, 5), guidance_ramp=(0.0, 1.0), temperatures=(1.0, 1.0),
        diffusion_steps=(1, 1), mask_ratios=(1.0, 34.5 / 36),
    )  # fmt: skip
    dependent, depends_on = (footprint(5, 6, 1, 8).sum(axis) for axis in (0, 1))
    assert sorted(dependent.tolist()) != sorted(depends_on.tolist()), "they can be told apart"
    counts = []
    for visible in combinations(range(36), 2):
        hidden = [i for i in range(36) if i not in visible]
        found = seen_rows(plan, 0, config, torch.tensor([hidden + list(visible)]))
        assert found is not None
        counts.append(len(found))
    assert mean_rows(plan, 0, config) == pytest.approx(sum(counts) / len(counts), rel=1e-12)
    assert mean_rows(plan, 0, config, "fixed") == mean_rows(plan, 1, config) == 36
    whole = plan.with_changes(input_levels=(None, None))
    assert mean_rows(whole, 0, config) == mean_rows(whole, 0, config, "fixed") == 2
    assert mean_rows(whole, 0, config, "all") == 36
    assert mean_rows(whole.with_changes(mask_ratios=None), 0, config) == 36


# --- sampling --------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(tokens, condition rows) of each call of the head."""
    calls: list[tuple[int, int]] = []
    plain = outer_step.denoise_loop

    def loop(
        head: Any, condition: Tensor, level: float, initial: Tensor, *more: Any, **options: Any
    ) -> Tensor:
        calls.append((len(initial), len(condition)))
        return plain(head, condition, level, initial, *more, **options)

    monkeypatch.setattr(outer_step, "denoise_loop", loop)
    return calls


def test_the_head_runs_on_the_rows_that_are_looked_at(
    model: FAR, counted: list[tuple[int, int]]
) -> None:
    truth = run(model, backend="reference")
    every = run(model, on_level=lambda k, x: None)
    assert counted == [(300, 300), (300, 600), (300, 600), (300, 300), (300, 600)]
    counted.clear()
    zeros: list[int] = []
    listened = run(
        model, on_level=lambda k, x: zeros.append(int((x == 0).sum())), whole_levels=False
    )
    tokens = [n for n, _ in counted]
    assert tokens[0] == 9 and 21 < tokens[1] < 270 and 30 < tokens[2] < 270
    assert tokens[3:] == [300, 300]
    assert [m // n for n, m in counted] == [1, 2, 2, 1, 2]
    assert zeros == [4 * (300 - n) for n in tokens]
    for k, n in enumerate(tokens):
        # One run: as likely as not more than the mean.
        assert n / BATCH == pytest.approx(mean_rows(PLAN, k, model.config), rel=0.35), k
    counted.clear()
    alone = run(model)
    assert [n for n, _ in counted] == tokens and torch.equal(alone, listened)
    assert relative(every, truth) < 1e-9 and relative(alone, truth) < 1e-9
    assert relative(alone, every) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("library")
def test_native_sees_the_same(
    model: FAR, dtype: torch.dtype, counted: list[tuple[int, int]]
) -> None:
    truth = run(model, backend="reference")
    every = run(model, backend="native", dtype=dtype, on_level=lambda k, x: None)
    counted.clear()
    alone = run(model, backend="native", dtype=dtype)
    assert counted[0][0] == 9
    assert relative(alone, truth) <= FACTOR * relative(every, truth) + FLOOR[dtype]


class Filled(OuterStep):
    """Whatever is not computed is huge."""

    def __call__(
        self, k: int, inputs: Any, latent_BCHH: Tensor, initial_NP: Tensor, noise_TNP: Tensor
    ) -> Tensor:
        latent_BCHH = super().__call__(k, inputs, latent_BCHH, initial_NP, noise_TNP)
        rows_M = seen_rows(self.plan, k, self.model.config, inputs.order_BL, self.rows)
        if rows_M is None:
            return latent_BCHH
        fill_NP = torch.full_like(initial_NP, 1e30).index_fill(0, rows_M, 0.0)
        return latent_BCHH + unpatchify(fill_NP.view(BATCH, -1, 4), 2)


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("kind", ["area_bicubic", "fourier"])
def test_nothing_sees_what_is_not_computed(
    config: FARConfig, kind: str, backend: str, request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if backend == "native":
        request.getfixturevalue("library")
    model = made(dataclasses.replace(config, filter=kind))
    options = {"backend": backend, "dtype": torch.float32}
    plan = PLAN.with_changes(x0_range=(-2.0, 2.0))
    expected = run(model, plan=plan, **options)
    monkeypatch.setattr(sampling, "OuterStep", Filled)
    filled: list[float] = []
    seen = run(
        model, plan=plan, whole_levels=False, **options,
        on_level=lambda k, x: filled.append(float(x.abs().max())),
    )  # fmt: skip
    assert filled[0] == pytest.approx(1e30)
    assert torch.equal(seen, expected)


def test_a_step_that_nobody_looks_at_costs_nothing(
    model: FAR, counted: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = PLAN.with_changes(mask_ratios=(1.0, 1.0, 0.93, 0.9, 0.0))
    passes: list[int] = []
    monkeypatch.setattr(OuterStep, "_first_condition", lambda self, inputs: passes.append(0))
    alone = run(model, plan=plan)
    assert len(counted) == 4 and not passes
    monkeypatch.undo()
    assert relative(alone, run(model, plan=plan, backend="reference")) < 1e-9


def test_products_are_counted(model: FAR) -> None:
    """PyTorch's own counter says the same, but for the number of the level, which is embedded."""
    config = model.config
    alike = copy.deepcopy(model).set_attention_backend("sdpa_math")
    few = PLAN.with_changes(input_levels=(None, None, None, 16, 15))
    for plan, seeds in ((few, 1), (PLAN, 4)):
        with FlopCounterMode(display=False) as counter:
            for seed in range(seeds):
                run(alike, labels=[1], plan=plan, generator=seed, dtype=torch.float32)
        filters = 4 * 2 * 2 * 20**3
        head = sum(
            loop.hoisted_flops()
            for k in range(len(plan))
            for loop in counts.loops_of(config, plan, k)
        )
        counted = counts.native_work(config, plan, None)["transformer"].flops + head + filters
        accuracy = 1e-4 if plan is few else 0.03
        assert counter.get_total_flops() / seeds == pytest.approx(counted, rel=accuracy)
    fixed = counts.native_work(config, PLAN, None, "fixed")["head"].flops
    assert fixed > 1.2 * counts.native_work(config, PLAN, None)["head"].flops


def test_a_progress_bar_costs_no_rows(
    counted: list[tuple[int, int]], capfd: pytest.CaptureFixture[str]
) -> None:
    pipe = tiny_pipeline()

    def tokens(**options: Any) -> list[int]:
        counted.clear()
        pipe([1, 2], generator=0, output_type="latent", backend="torch", **options)
        return [n for n, _ in counted]

    pipe.plan = pipe.plan.with_changes(input_levels=(None, None, 10))
    few = tokens()
    assert few[0] == 2 * 3 and few[2] == 2 * 16
    pipe.set_progress_bar_config()
    assert tokens() == few and "6/6" in capfd.readouterr().err

    def callback(pipe: Any, step: int, latents: Tensor) -> None:
        pass

    assert tokens(callback_on_level_end=callback) == [32, 32, 32]
    assert tokens(callback_on_level_end=callback, whole_levels=False) == few
