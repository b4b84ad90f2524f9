"""The paper's experiments in small: what is varied, as data, and what the paper found.

Models are those of the recipe "small" with the changes that a variant names; the seed of a run
decides its weights, its data and its samples, so runs of one seed pair up.

Source of every figure called "paper": FAR, arXiv 2503.05305, tables 2, 5 and 6, on ImageNet at 256
pixels (FID of 50,000 images): directions may be compared, values may not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastfar.plan import cosine_mask_ratios, ramp

TEN = (0, 2, 3, 4, 5, 6, 7, 8, 9, 10)  # levels of the default plan, and of the recipe "small"
NUM_LEVELS = 16


@dataclass(frozen=True)
class Variant:
    """One way to train and sample.

    Attributes:
        name: what tables call it; unique within its study.
        recipe: entries that differ from the base recipe's; of "model", only those that differ.
        plan: changes of the plan, arguments of `SamplingPlan.with_changes`.
        levels: sampled at these levels, with the guidance, temperatures and masks that the default
            plan has for as many; None: those that it was exported with.
        against: variant to compare with; None is the study's base.
        factors: what it is in each respect, for studies that cross several.
        x: place on the axis of the plot, for studies of a number.
        paper: what the paper has for it.
    """

    name: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
    levels: tuple[int, ...] | None = None
    against: str | None = None
    factors: Mapping[str, str] = field(default_factory=dict)
    x: float | None = None
    paper: str = ""


@dataclass(frozen=True)
class Study:
    """One experiment.

    Attributes:
        name: as on the command line.
        question, prediction: written before the run; the prediction is the paper's.
        base: name of the variant that others are compared with.
        variants: in the order of the tables.
        axis: what `Variant.x` is.
    """

    name: str
    question: str
    prediction: str
    base: str
    variants: tuple[Variant, ...]
    axis: str = ""

    def against(self, variant: Variant) -> str | None:
        """Name of what a variant is compared with; None for a base."""
        name = variant.against or self.base
        return None if name == variant.name else name


def _head_widths() -> tuple[Variant, ...]:
    paper = {64: "3.83 (256)", 128: "3.66", 256: "3.45", 384: "3.38 (1536)"}
    return tuple(
        Variant(f"head {width}", {"model": {"head_width": width}}, x=width, paper=paper[width])
        for width in (64, 128, 256, 384)
    )


def _cross() -> tuple[Variant, ...]:
    paper = {
        ("none", "none"): "13.47",
        ("none", "sine"): "12.83",
        ("paper", "none"): "4.11",
        ("paper", "sine"): "4.05",
    }
    return tuple(
        Variant(
            f"{target}, mask {mask}, weight {weight}",
            {"target": target, "mask_rule": _entry(mask), "level_weight": _entry(weight)},
            factors={"target": target, "mask": mask, "weight": weight},
            paper=paper[mask, weight] if target == "clean" else "",
        )
        for target in ("clean", "next_level")
        for mask in ("paper", "none")
        for weight in ("sine", "none")
    )


def _entry(name: str) -> str | None:
    return None if name == "none" else name


def _diffusion_steps() -> tuple[Variant, ...]:
    """T of every outer step: constant, and 4/7 to 10/7 of the mean (40..100), either way round."""
    variants = []
    for mean in (8, 16, 70):
        first = round(mean * 4 / 7)
        steps = ramp(first, 2 * mean - first, len(TEN))
        constant = f"constant {mean}"
        variants += [
            Variant(constant, plan={"diffusion_steps": mean}, against=constant),
            Variant(f"rising {mean}", plan={"diffusion_steps": steps}, against=constant),
            Variant(f"falling {mean}", plan={"diffusion_steps": steps[::-1]}, against=constant),
        ]
    return tuple(variants)


def _outer_steps() -> tuple[Variant, ...]:
    return tuple(
        Variant(
            f"{steps} steps", {"levels": None}, levels=ramp(0, NUM_LEVELS - 1, steps), x=steps
        )
        for steps in (4, 6, 8, 10, 12, 16)
    )


def _masks() -> tuple[Variant, ...]:
    ratios = {"with masks": cosine_mask_ratios(len(TEN)), "without": None}
    return tuple(
        Variant(
            f"trained {rule}, sampled {how}",
            {"mask_rule": _entry(rule)},
            {"mask_ratios": ratios[how]},
            factors={"trained": rule, "sampled": how},
        )
        for rule in ("paper", "official", "none")
        for how in ratios
    )


_STUDIES = (
    Study(
        "table2",
        "How wide must the denoising MLP be?",
        "The wider the better, with less to gain each time: FID 3.83, 3.66, 3.45, 3.38 at 0.25 to "
        "1.5 times the transformer's width.",
        "head 128",
        _head_widths(),
        axis="width of the head",
    ),
    Study(
        "table5",
        "What do the clean target, masks and the level weight each bring?",
        "With the clean target, masks bring nearly everything (13.47 to 4.11), the level weight a "
        "little (to 12.83 without masks, to 4.05 with them).",
        "clean, mask paper, weight sine",
        _cross(),
    ),
    Study(
        "table6",
        "How much guidance?",
        "Best in the middle: FID 5.13, 4.05, 4.22 at 2, 3, 4; more guidance, more precision and "
        "less recall.",
        "guidance 3",
        tuple(
            Variant(f"guidance {s}", plan={"guidance_scale": float(s)}, x=s, paper=paper)
            for s, paper in zip((1, 2, 3, 4, 5), ("", "5.13", "4.05", "4.22", ""), strict=True)
        ),
        axis="guidance scale",
    ),
    Study(
        "table8",
        "Are diffusion steps better spent on late outer steps?",
        "Low levels need fewer: T rising from 40 to 100 is as good as 100 throughout, so at one "
        "mean a rising T beats a constant one, which beats a falling one.",
        "constant 16",
        _diffusion_steps(),
    ),
    Study(
        "fig4",
        "How many outer steps?",
        "More are better, and ten are enough: the paper's default. T is the same at every outer "
        "step, so more of them are also more calls of the head.",
        "10 steps",
        _outer_steps(),
        axis="outer steps",
    ),
    Study(
        "filters",
        "Does it matter how the latent is low-passed?",
        "No: FID 4.05 with area and bicubic resampling, 4.21 with a Fourier filter.",
        "area_bicubic",
        (
            Variant("area_bicubic", paper="4.05"),
            Variant("fourier", {"model": {"filter": "fourier"}}, paper="4.21"),
        ),
    ),
    Study(
        "mask",
        "Is it the masks in training or in sampling that bring diversity, and which rule?",
        "Masks in sampling bring recall (0.11 to 0.51 in the paper), and training must know them. "
        "The paper's rule and that of its code mask opposite levels most; nothing is predicted of "
        "which is better.",
        "trained paper, sampled with masks",
        _masks(),
    ),
    Study(
        "levels",
        "Should a model be trained at the levels that it is sampled at, or at all?",
        "The paper trains at all. Ten of sixteen put the same steps where they count, so better.",
        "ten levels",
        (Variant("ten levels"), Variant("all levels", {"levels": None})),
    ),
)
STUDIES = {study.name: study for study in _STUDIES}
