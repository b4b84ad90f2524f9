"""Tables of a study from its rows alone: figures, paired differences, effects, every seed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from fastfar.evaluation import METRIC
from fastfar.evaluation.samples import digest
from fastfar.experiments.base import Row, Rows
from fastfar.experiments.paired import FEWEST_SEEDS, LEVEL, Difference, paired
from fastfar.experiments.paper import Study, Variant
from fastfar.experiments.report import table
from fastfar.experiments.study import EXPERIMENT, FLOOR

FIGURES = {METRIC: 3, "precision": 3, "recall": 3, "class_agreement": 3}  # name: digits
Scores = dict[int, Row]  # by seed


def study_report(study: Study, rows: Rows) -> str:
    """Markdown of a study: its prediction, and what its rows say."""
    found, floor = scores_of(study, rows), _by_seed(rows.find(part=study.name, kind="floor"))
    pieces = [f"# {study.name}: {study.question}", f"*Prediction.* {study.prediction}"]
    if not any(found.values()):
        return "\n\n".join([*pieces, "There are no rows yet."]) + "\n"
    pieces += [_setup(rows, study), _figures(study, found, floor)]
    pieces += [_missing(study, found)] if _missing(study, found) else []
    differences = _differences(study, found)
    if differences:
        pieces += ["## Differences", _rule(found), differences]
    effects = _effects(study, found)
    if effects:
        pieces += [
            "## Effects",
            "The mean difference over all pairs of variants that differ in this respect alone, "
            "paired by seed in the same way.",
            effects,
        ]
    return "\n\n".join([*pieces, "## Every seed", _seeds(study, rows)]) + "\n"


def scores_of(study: Study, rows: Rows) -> dict[str, Scores]:
    """{variant: {seed: figures}} of all variants, in the study's order.

    Raises:
        ValueError: rows of one study were not all made alike.
    """
    check_alike(study, rows)
    return {
        variant.name: _by_seed(_image_rows(study, variant, rows)) for variant in study.variants
    }


def check_alike(study: Study, rows: Rows) -> None:
    """ValueError where rows differ in N or in what training has but no variant changes."""
    changed = {"seed"}.union(*(variant.recipe for variant in study.variants)) - {"model"}
    sizes = set().union(*(variant.recipe.get("model", {}) for variant in study.variants))
    found = {}
    for row in rows.find(experiment=EXPERIMENT, part=study.name, kind="images"):
        recipe = {name: value for name, value in row["recipe"].items() if name not in changed}
        model = recipe.pop("model", {})
        if isinstance(model, Mapping):
            model = {name: value for name, value in model.items() if name not in sizes}
        made = {"N": row["samples"], "model": model, **recipe}
        found[digest(made)] = made
    if len(found) > 1:
        one, other, *_ = found.values()
        differing = sorted(
            name for name in {*one, *other} if one.get(name) != other.get(name)
        )
        told = "; ".join(f"{name} {one.get(name)!r} and {other.get(name)!r}" for name in differing)
        raise ValueError(
            f"{rows.path} mixes rows of {study.name} that cannot be compared ({told}): give each "
            "its own --output"
        )


def _image_rows(study: Study, variant: Variant, rows: Rows) -> list[Row]:
    return rows.find(
        experiment=EXPERIMENT, part=study.name, candidate=variant.name, kind="images"
    )


def _by_seed(rows: list[Row]) -> Scores:
    return {int(row["place"]): row["outcome"] for row in _sorted(rows)}


def _sorted(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: int(row["place"]))


def _setup(rows: Rows, study: Study) -> str:
    """What all rows share."""
    row = next(
        row
        for variant in study.variants
        for row in _image_rows(study, variant, rows)
    )
    outcome, training = row["outcome"], row["training"]
    return (
        f"Fashion-MNIST at 32 pixels, {training['images']:,} training images seen, "
        f"N = {outcome['count']:,} samples a seed, which decides weights, data and samples. "
        f"{METRIC}, precision and recall are on features of extractor {outcome['extractor']} "
        f"against {outcome['reference']}; no figure compares with an ImageNet FID. "
        f'"{FLOOR}" are as many of the training split.'
    )


def _figures(study: Study, found: Mapping[str, Scores], floor: Scores) -> str:
    head = ["variant", "seeds", METRIC, "precision", "recall", "class agreement", "paper's FID"]
    lines = []
    papers = {variant.name: variant.paper for variant in study.variants}
    for name, scores in (*found.items(), (FLOOR, floor)):
        if scores:
            cells = [_mean_and_deviation(scores, figure) for figure in FIGURES]
            base = " (base)" if name == study.base else ""
            lines.append([name + base, str(len(scores)), *cells, papers.get(name, "")])
    if not any(papers.values()):
        head, lines = head[:-1], [line[:-1] for line in lines]
    return f"Mean +- standard deviation over seeds:\n\n{table(head, lines)}"


def _mean_and_deviation(scores: Scores, figure: str) -> str:
    values, digits = [score[figure] for score in scores.values()], FIGURES[figure]
    deviation = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def _missing(study: Study, found: Mapping[str, Scores]) -> str:
    seeds = {seed for scores in found.values() for seed in scores}
    lacking = [
        f"{name}, seed {seed}"
        for name, scores in found.items()
        for seed in sorted(seeds - set(scores))
    ]
    return f"Not there: {'; '.join(lacking)}." if lacking else ""


def _rule(found: Mapping[str, Scores]) -> str:
    compared = len(FIGURES) * sum(1 for scores in found.values() if scores)
    return (
        "Variant minus the one it is compared with, paired by seed, and Student's t of the pairs. "
        f"Bold is called a difference: at least {FEWEST_SEEDS} seeds and p below {LEVEL:.0%} "
        "(|t| above 4.30 for 3 seeds). No correction for their number: of up to "
        f"{compared} comparisons {LEVEL * compared:.1f} are bold by chance alone."
    )


def _differences(study: Study, found: Mapping[str, Scores]) -> str:
    lines = []
    for variant in study.variants:
        other = study.against(variant)
        cells = None if other is None else _compared([(found[variant.name], found[other])])
        if other is not None and cells is not None:
            lines.append([variant.name, other, *cells])
    head = ("variant", "against", METRIC, "precision", "recall", "class agreement")
    return table(head, lines) if lines else ""


def _compared(pairs: list[tuple[Scores, Scores]]) -> list[str] | None:
    """A cell for each figure; a seed counts where all pairs have it, with the mean of the pairs."""
    seeds = set.intersection(*(set(ours) & set(theirs) for ours, theirs in pairs))
    if not seeds:
        return None
    cells = []
    for figure, digits in FIGURES.items():
        means = [
            statistics.fmean(ours[seed][figure] - theirs[seed][figure] for ours, theirs in pairs)
            for seed in sorted(seeds)
        ]
        cells.append(_difference(paired(means), digits))
    return cells


def _difference(difference: Difference, digits: int) -> str:
    text = f"{difference.mean:+.{digits}f}"
    if difference.count > 1:
        text += f" (t {difference.t:.1f})"
    return f"**{text}**" if difference.is_one else text


def _effects(study: Study, found: Mapping[str, Scores]) -> str:
    """For studies that cross factors: what one of them does, the others being what they may."""
    base = next(variant for variant in study.variants if variant.name == study.base)
    lines = []
    for factor, usual in base.factors.items():
        values = dict.fromkeys(variant.factors[factor] for variant in study.variants)
        for value in values:
            pairs = [
                (found[one.name], found[other.name])
                for one in study.variants
                for other in study.variants
                if one.factors == {**other.factors, factor: value}
                and other.factors[factor] == usual
                and value != usual
                and found[one.name]
                and found[other.name]
            ]
            cells = _compared(pairs) if pairs else None
            if cells is not None:
                lines.append([f"{factor} {value}", f"{factor} {usual}", str(len(pairs)), *cells])
    head = ("effect of", "against", "pairs", METRIC, "precision", "recall", "class agreement")
    return table(head, lines) if lines else ""


def _seeds(study: Study, rows: Rows) -> str:
    head = ("variant", "seed", "N", "head calls", *FIGURES, "loss", "training s", "run")
    return table(
        head,
        [
            _seed_line(row)
            for variant in study.variants
            for row in _sorted(_image_rows(study, variant, rows))
        ],
    )


def _seed_line(row: Row) -> list[str]:
    outcome, training = row["outcome"], row["training"]
    return [
        row["candidate"],
        row["place"],
        f"{outcome['count']:,}",
        str(row["head_calls"]),
        *(f"{outcome[figure]:.{digits}f}" for figure, digits in FIGURES.items()),
        str(training["loss"]),
        f"{training['seconds']:.0f}",
        row["checkpoint"],
    ]
