"""plan.py: the published and the paper's schedules as numbers, and what is not a plan."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from fastfar.plan import SamplingPlan, cosine_mask_ratios

NOMASK = (0, 2, 3, 4, 5, 6, 7, 8, 9, 10)
MASK = (0, 12, 12, 4, 5, 6, 7, 8, 9, 10, 11)
T2I = (0, 2, 3, 4, 5, 6, 7, 8, 10, 13)


def near(*values: float) -> object:
    return pytest.approx(values, abs=1e-6)


def test_official_nomask() -> None:
    plan = SamplingPlan.official("nomask", guidance_scale=3.0)
    assert plan.levels == NOMASK and plan.input_levels[1:] == NOMASK[1:]
    assert plan.guidance_scales == near(1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2, 2.4, 2.6, 2.8)
    # 0.8 + 0.2 (1 - cos(pi/2 (k + 1) / 10))
    assert plan.temperatures == near(
        0.802462, 0.809789, 0.821799, 0.838197, 0.858579, 0.882443, 0.909202, 0.938197, 0.968713, 1
    )
    assert plan.diffusion_steps == (100,) * 10
    assert plan.mask_ratios is None and plan.num_masked(3, 256) == 0
    assert plan.x0_range is None
    assert len(plan) == 10 and plan.head_calls == 1000
    assert SamplingPlan.official() == plan


def test_official_mask() -> None:
    plan = SamplingPlan.official("mask", guidance_scale=3.0)
    assert plan.levels == MASK
    assert plan.input_levels[1:] == (None, *MASK[2:]), "the result of step 0 is not filtered"
    assert plan.guidance_scales == near(*(1 + 2 * k / 11 for k in range(11)))
    assert plan.temperatures == near(*(0.85 + 0.15 * k / 11 for k in range(11)))
    masked = [plan.num_masked(k, 256) for k in range(11)]
    assert masked == [256, 253, 245, 232, 215, 193, 167, 138, 106, 72, 36]
    assert [plan.num_masked(k, 64) for k in range(3)] == [64, 63, 61]
    assert len(plan) == 11 and plan.head_calls == 1100


def test_official_t2i() -> None:
    plan = SamplingPlan.official("t2i", guidance_scale=7.5, diffusion_steps=50)
    assert plan.levels == T2I and plan.input_levels[1:] == T2I[1:]
    assert plan.guidance_scales == (7.5,) * 10, "constant"
    assert plan.temperatures == SamplingPlan.official("nomask").temperatures
    masked = [plan.num_masked(k, 256) for k in range(10)]
    assert masked == [256, 252, 243, 228, 207, 181, 150, 116, 79, 40]
    assert plan.head_calls == 500


def test_paper_steps_grow_linearly() -> None:
    plan = SamplingPlan.paper("nomask")
    assert plan.diffusion_steps == (40, 47, 53, 60, 67, 73, 80, 87, 93, 100)
    assert plan.head_calls == 700
    masked = SamplingPlan.paper("mask")
    assert masked.diffusion_steps == (40, 46, 52, 58, 64, 70, 76, 82, 88, 94, 100)
    assert masked.head_calls == 770
    assert SamplingPlan.paper("nomask", 2.0, (10, 10)) == SamplingPlan.official("nomask", 2.0, 10)


@pytest.mark.parametrize("mode", ["nomask", "mask", "t2i"])
def test_guidance_one_is_none_at_any_step(mode: str) -> None:
    assert set(SamplingPlan.official(mode, guidance_scale=1.0).guidance_scales) == {1.0}


def test_cosine_mask_ratios() -> None:
    assert cosine_mask_ratios(2) == near(1.0, math.sqrt(0.5))
    assert cosine_mask_ratios(7)[0] == 1.0


@pytest.mark.parametrize("mode", ["nomask", "mask", "t2i"])
def test_dictionary_and_back(mode: str) -> None:
    plan = SamplingPlan.paper(mode, 2.5).with_changes(x0_range=(-1.0, 2.0))
    as_json = json.loads(json.dumps(plan.to_dict()))  # tuples become lists and come back
    assert SamplingPlan.from_dict(as_json) == plan
    assert hash(SamplingPlan.from_dict(as_json)) == hash(plan)
    with pytest.raises(ValueError, match="cfg_scale"):
        SamplingPlan.from_dict({**plan.to_dict(), "cfg_scale": 2.0})


def test_with_changes() -> None:
    plan = SamplingPlan.official("nomask")
    assert plan.with_changes() == plan
    assert plan.with_changes(guidance_scale=5.0) == SamplingPlan.official("nomask", 5.0)
    assert plan.with_changes(diffusion_steps=25).diffusion_steps == (25,) * 10
    assert plan.with_changes(diffusion_steps=tuple(range(1, 11))).head_calls == 55
    assert plan.with_changes(x0_range=[-1.0, 1.0]).x0_range == (-1.0, 1.0)
    assert plan.x0_range is None, "the original stays as it is"
    with pytest.raises(TypeError):
        plan.with_changes(steps=3)


def test_a_plan_of_ones_own() -> None:
    plan = SamplingPlan(
        levels=(0, 5),
        input_levels=(None, None),
        guidance_scale=0.0,
        guidance_ramp=(0.0, 0.5),
        temperatures=(0.0, 1.0),
        diffusion_steps=(1, 1000),
        mask_ratios=(1.0, 0.0),
        x0_range=(-2.0, 2.0),
    )
    assert plan.guidance_scales == (1.0, 0.5) and plan.num_masked(1, 9) == 0
    plan.check_fits(5)


NAN, INF = float("nan"), float("inf")
BAD = [
    ({"levels": ()}, "at least one level"),
    ({"levels": (0, 2)}, "input_levels has 10 entries, levels has 2"),
    ({"levels": (1, *NOMASK[1:])}, "first level must be 0"),
    ({"levels": (0, 3, 2, *NOMASK[3:])}, "rise"),
    ({"levels": (0, 2, 2, *NOMASK[3:])}, "rise"),
    ({"levels": (0, 2.5, *NOMASK[2:])}, "whole numbers"),
    ({"levels": (0, -1, *NOMASK[2:])}, "from 0 upwards"),
    ({"input_levels": (None, 2.5, *NOMASK[2:])}, "input_levels.*2.5"),
    ({"input_levels": (None, -1, *NOMASK[2:])}, "input_levels.*-1"),
    ({"guidance_scale": NAN}, "guidance_scale"),
    ({"guidance_scale": INF}, "guidance_scale"),
    ({"guidance_scale": -0.1}, "at least 0"),
    ({"guidance_ramp": (1.5,) * 10}, "guidance_ramp"),
    ({"guidance_ramp": (NAN,) * 10}, "guidance_ramp"),
    ({"temperatures": (-1.0,) * 10}, "temperatures"),
    ({"temperatures": (NAN,) * 10}, "temperatures"),
    ({"temperatures": (1.0,) * 9}, "temperatures has 9"),
    ({"diffusion_steps": 0}, r"1\.\.1000"),
    ({"diffusion_steps": -5}, r"1\.\.1000"),
    ({"diffusion_steps": 1001}, r"1\.\.1000"),
    ({"diffusion_steps": (10.0,) * 10}, "whole numbers"),
    ({"diffusion_steps": (10,) * 9}, "diffusion_steps has 9"),
    ({"mask_ratios": (1.0,) * 9}, "mask_ratios has 9"),
    ({"mask_ratios": (0.5,) * 10}, "first mask ratio"),
    ({"mask_ratios": (1.0, 0.5, 0.6, *[0.1] * 7)}, "never rise"),
    ({"mask_ratios": (1.0, NAN, *[0.1] * 8)}, r"\[0, 1\]"),
    ({"mask_ratios": (1.0, *[-0.1] * 9)}, r"\[0, 1\]"),
    ({"x0_range": (1.0, 1.0)}, "low < high"),
    ({"x0_range": (2.0, -2.0)}, "low < high"),
    ({"x0_range": (NAN, 1.0)}, "x0_range"),
    ({"x0_range": (0.0, INF)}, "x0_range"),
]


@pytest.mark.parametrize("change, message", BAD, ids=lambda value: str(value)[:40])
def test_what_is_not_a_plan(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingPlan.official("nomask").with_changes(**change)  # type: ignore[arg-type]


def test_modes_and_levels_beyond_the_model() -> None:
    for build in (SamplingPlan.official, SamplingPlan.paper):
        with pytest.raises(ValueError, match="nomask"):
            build("random")
    plan = SamplingPlan.official("nomask")
    plan.check_fits(10)
    with pytest.raises(ValueError, match=r"levels 0\.\.9"):
        plan.check_fits(9)
    beyond = plan.with_changes(input_levels=(None, 17, *NOMASK[2:]))
    with pytest.raises(ValueError, match="17"):
        beyond.check_fits(16)


def test_a_plan_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingPlan.official().guidance_scale = 2.0  # type: ignore[misc]


def test_fast_presets() -> None:
    own = SamplingPlan.official("mask", guidance_scale=2.0).with_changes(x0_range=(-1.0, 2.0))
    fast = SamplingPlan.fast(own)
    assert fast.diffusion_steps == (6,) * len(own)
    assert fast.is_approximate and not own.is_approximate
    kept = ("levels", "guidance_scale", "temperatures", "mask_ratios", "x0_range")
    assert all(getattr(fast, name) == getattr(own, name) for name in kept)
    assert SamplingPlan.fast(own, guidance_scale=4.0).guidance_scale == 4.0
    assert SamplingPlan.fast("mask").levels == own.levels
    with pytest.raises(ValueError, match="mode must be one of"):
        SamplingPlan.fast("quick")
