"""The paper's experiments in small: variants, runs, rows, the paired test, tables, the command."""

from __future__ import annotations

import json
import math
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from idx import write_fashion_mnist
from tiny_run import TINY_FASHION

from fastfar import cli
from fastfar.evaluation import METRIC
from fastfar.experiments import STUDIES, Rows, Study, Variant, study, trained
from fastfar.experiments.paired import paired, two_sided_p
from fastfar.experiments.paper import TEN
from fastfar.experiments.study import EXPERIMENT, FLOOR, Studio, picture, run_study
from fastfar.experiments.study_plot import save_plot
from fastfar.experiments.study_report import study_report
from fastfar.experiments.trained import run_key, told
from fastfar.tokenizer import PixelTokenizer
from fastfar.training import Recipe, Trainer, default_plan

TINY: dict[str, Any] = {
    "model": {**TINY_FASHION, "width": 16, "head_width": 16},
    "steps": 2,
    "batch_size": 8,
    "levels": TEN,
    "dtype": "float32",
    "backend": "torch",
}
# Three variants of two models; fewer outer steps and diffusion steps than the real ones.
SMALL = Study(
    "small",
    "Does it run?",
    "It does.",
    "base",
    (
        Variant("base", plan={"diffusion_steps": 2}, factors={"head": "narrow", "T": "2"}),
        Variant("more T", plan={"diffusion_steps": 3}, factors={"head": "narrow", "T": "3"}),
        Variant("wide", {"model": {"head_width": 24}}, {"diffusion_steps": (1, 2)}, levels=(0, 5)),
    ),
)


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    (tmp_path / "data").mkdir()
    write_fashion_mnist(tmp_path / "data", train=40, test=60)
    return Studio(
        Recipe.from_dict(TINY),
        tmp_path / "work",
        tmp_path / "rows.jsonl",
        samples=40,
        seeds=(0, 1),
        data=tmp_path / "data",
        backend="torch",
    )


# --- variants and runs as data -----------------------------------------------------------------


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_can_be_run(name: str, tmp_path: Path) -> None:
    found = STUDIES[name]
    names = [variant.name for variant in found.variants]
    assert len(set(names)) == len(names) and found.base in names
    studio = Studio(Recipe.load("small"), tmp_path, tmp_path / "rows.jsonl")
    for variant in found.variants:
        assert found.against(variant) in (*names, None)
        assert (found.axis != "") == (variant.x is not None)
        recipe = studio.recipe_of(variant, 1)
        assert recipe.seed == 1 and recipe.config.width == 96
        levels = variant.levels or recipe.levels
        plan = default_plan(recipe.with_changes({"levels": levels}), PixelTokenizer(0.0, 1.0))
        plan = plan.with_changes(**variant.plan)
        plan.check_fits(recipe.config.num_levels)
        # What is compared spends the same calls of the head, but for outer steps.
        if name not in ("fig4", "table8"):
            assert plan.head_calls == 160
        if name == "table8":
            assert plan.head_calls == 10 * int(variant.name.split()[1])
    base = next(variant for variant in found.variants if variant.name == found.base)
    assert found.against(base) is None


def test_what_the_variants_change() -> None:
    by_name = {v.name: v for found in STUDIES.values() for v in found.variants}
    assert by_name["next_level, mask none, weight none"].recipe == {
        "target": "next_level",
        "mask_rule": None,
        "level_weight": None,
    }
    rising = by_name["rising 70"].plan["diffusion_steps"]
    assert rising[0] == 40 and rising[-1] == 100 and sum(rising) == 700
    assert by_name["falling 70"].plan["diffusion_steps"] == rising[::-1]
    assert by_name["16 steps"].levels == tuple(range(16))
    assert by_name["trained paper, sampled without"].plan == {"mask_ratios": None}


def test_runs_are_named_by_what_is_trained() -> None:
    small = Recipe.load("small")
    # Committed rows name their runs: these may not change.
    assert run_key(small) == "bf046cef3af0"
    assert run_key(small.with_changes({"levels": None})) == "b8ccabd8a60d"
    assert "weight_decay" not in told(small) and told(small)["steps"] == 1200
    assert run_key(small.with_changes({"weight_decay": small.weight_decay})) == run_key(small)
    assert run_key(small.with_changes({"seed": 1})) != run_key(small)


# --- runs, rows, pictures ----------------------------------------------------------------------


def test_a_study_trains_and_judges_once(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows(studio.output)
    assert run_study(SMALL, studio, rows) == []
    assert len(list((studio.work / "runs").iterdir())) == 4  # two models, two seeds
    assert len(rows.find(kind="images")) == 6 and len(rows.find(kind="floor")) == 2
    (wide,) = rows.find(candidate="wide", place="1")
    assert wide["recipe"]["model"]["head_width"] == 24 and wide["recipe"]["seed"] == 1
    assert wide["plan"]["levels"] == (0, 5) and wide["head_calls"] == 3
    assert wide["training"]["images"] == 16 and wide["training"]["seconds"] > 0
    assert wide["outcome"]["count"] == 40 and wide["outcome"][METRIC] > 0
    key = run_key(studio.recipe_of(SMALL.variants[2], 1))
    assert wide["checkpoint"] == key and (studio.work / "runs" / key / "export").is_dir()

    before = studio.output.read_text()
    monkeypatch.setattr(study, "train", None)
    monkeypatch.setattr("fastfar.experiments.images.draw_samples", None)
    again = Rows(studio.output)
    assert run_study(SMALL, studio, again) == [] and studio.output.read_text() == before
    monkeypatch.undo()
    drawn = picture(SMALL, studio, again)
    assert drawn is not None and drawn.height == 3 * 66 - 2 and drawn.width > 20 * 66


def test_nothing_is_trained_unless_it_may_be(studio: Studio) -> None:
    studio.trains, rows = False, Rows(studio.output)
    assert picture(SMALL, studio, rows) is None
    missing = run_study(SMALL, studio, rows, ("wide",))
    assert missing == ["wide, seed 0", "wide, seed 1"]
    assert rows.find(kind="images") == [] and not (studio.work / "runs").exists()


def test_a_stopped_training_goes_on(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, folder = studio.recipe_of(SMALL.variants[0], 0), studio.work / "run"
    run = Trainer.run

    def stopped(trainer: Trainer, **options: Any) -> str:
        return run(trainer, **options, on_step=lambda _: signal.raise_signal(signal.SIGINT))

    monkeypatch.setattr(Trainer, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        trained.train(recipe, folder, studio.data, studio.tell)
    assert not trained.is_trained(folder)
    steps = []
    monkeypatch.setattr(Trainer, "run", lambda t, **o: (steps.append(t.step), run(t, **o))[1])
    trained.train(recipe, folder, studio.data, studio.tell)
    assert steps == [1] and trained.is_trained(folder)


# --- the paired test ---------------------------------------------------------------------------


def test_the_paired_test_is_students() -> None:
    scipy = pytest.importorskip("scipy.stats")
    ours, theirs = [3.1, 2.9, 3.6, 3.3], [2.8, 2.7, 3.0, 3.2]
    found = paired([a - b for a, b in zip(ours, theirs, strict=True)])
    expected = scipy.ttest_rel(ours, theirs)
    assert found.t == pytest.approx(expected.statistic)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-5)
    for t, freedom in ((0.0, 1), (0.7, 2), (-4.3, 2), (2.0, 9), (30.0, 4)):
        expected_p = 2 * scipy.t.sf(abs(t), freedom)
        assert two_sided_p(t, freedom) == pytest.approx(expected_p, rel=1e-4)


def test_three_seeds_make_a_difference() -> None:
    assert two_sided_p(4.3027, 2) == pytest.approx(0.05, rel=1e-3)
    assert paired([1.0, 1.1, 0.9]).is_one and not paired([1.0, 1.1, -0.9]).is_one
    assert two_sided_p(100.0, 1) < 0.05 and not paired([1.0, 1.001]).is_one  # two seeds
    assert math.isnan(paired([2.0]).t) and not paired([2.0]).is_one
    assert paired([0.0] * 3).p == 1.0 and paired([-0.5] * 3).p < 1e-6
    with pytest.raises(ValueError, match="at least one pair"):
        paired([])


# --- tables from rows alone --------------------------------------------------------------------


def write_rows(path: Path, found: Study, figures: dict[str, list[float]]) -> Rows:
    """A row for every variant and seed whose distance is given; other figures are constant."""
    rows = Rows(path)
    for name, values in figures.items():
        for seed, fd in enumerate(values):
            outcome = {"name": name, "kind": "samples", "count": 1000, METRIC: fd}
            outcome |= {"precision": 0.5, "recall": 0.25, "class_agreement": 0.75}
            outcome |= {"extractor": "abc", "reference": "test 10000"}
            row = {"experiment": EXPERIMENT, "part": found.name, "candidate": name}
            row |= {"kind": "floor" if name == FLOOR else "images", "place": str(seed)}
            row |= {"head_calls": 160, "checkpoint": "f00", "samples": 1000, "recipe": {}}
            row |= {"training": {"images": 38400, "seconds": 61.2, "loss": 0.2}}
            rows.get(row, f"{name} {seed}", lambda outcome=outcome: outcome)
    return rows


def lines_of(text: str, start: str) -> list[list[str]]:
    """Cells of the table rows that start so."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_figures_and_differences(tmp_path: Path) -> None:
    filters = STUDIES["filters"]
    figures = {"area_bicubic": [5.0, 6.0, 7.0], "fourier": [5.5, 6.6, 7.4], FLOOR: [1.0, 1.5]}
    text = study_report(filters, write_rows(tmp_path / "rows.jsonl", filters, figures))
    assert "*Prediction.* No: FID 4.05" in text and "extractor abc against test 10000" in text
    assert lines_of(text, "area_bicubic")[0] == [
        "area_bicubic (base)", "3", "6.000 +- 1.000", "0.500 +- 0.000", "0.250 +- 0.000",
        "0.750 +- 0.000", "4.05",
    ]  # fmt: skip
    # Pairs 0.5, 0.6, 0.4: t = 0.5 / (0.1 / sqrt(3)) = 8.7 of 2 degrees of freedom.
    (_, difference, *_) = lines_of(text, "fourier")
    assert difference[:4] == ["fourier", "area_bicubic", "**+0.500 (t 8.7)**", "+0.000 (t 0.0)"]
    assert lines_of(text, "real images")[0][1:3] == ["2", "1.250 +- 0.354"]
    assert len(lines_of(text, "fourier")) == 2 + 3 and "Not there" not in text
    assert "| fourier | 2 | 1,000 | 160 | 7.400 |" in text


def test_two_seeds_make_none_and_gaps_are_named(tmp_path: Path) -> None:
    filters = STUDIES["filters"]
    figures = {"area_bicubic": [5.0, 6.0, 7.0], "fourier": [8.0, 9.0001]}
    text = study_report(filters, write_rows(tmp_path / "rows.jsonl", filters, figures))
    assert "Not there: fourier, seed 2." in text
    (cell,) = {line[2] for line in lines_of(text, "fourier | area")}
    assert re.fullmatch(r"\+3\.000 \(t \d+\.\d\)", cell)  # a large t, and not bold
    empty = study_report(filters, Rows(tmp_path / "none.jsonl"))
    assert "There are no rows yet." in empty and "*Prediction.*" in empty


def test_rows_that_were_made_differently_are_not_compared(tmp_path: Path) -> None:
    filters, path = STUDIES["filters"], tmp_path / "rows.jsonl"
    rows = write_rows(path, filters, {"area_bicubic": [5.0]})
    (first,) = list(rows)
    row = {name: value for name, value in first.items() if name not in ("key", "outcome")}
    # What the variants and seeds of the study change may differ.
    row |= {"candidate": "fourier", "recipe": {"seed": 1, "model": {"filter": "fourier"}}}
    rows.get(row, "alike", lambda: first["outcome"])
    study_report(filters, rows)
    rows.get({**row, "samples": 5000}, "more", lambda: first["outcome"])
    with pytest.raises(ValueError, match=r"mixes rows of filters .*N 1000 and 5000.*--output"):
        study_report(filters, rows)


def test_effects_are_means_over_the_other_factors(tmp_path: Path) -> None:
    """Distances that are sums of one number for each factor, and of the seed."""
    cross = STUDIES["table5"]
    cost = {"clean": 0.0, "next_level": 2.0, "paper": 0.0, "none": 0.0, "sine": 0.0}

    def distance(variant: Variant, seed: int) -> float:
        target, mask, weight = (variant.factors[name] for name in ("target", "mask", "weight"))
        noise = 0.1 * seed if target == "next_level" else 0.0
        masked, weighted = 9.0 * (mask == "none"), 0.25 * (weight == "none")
        return 4.0 + seed + cost[target] + noise + masked + weighted

    figures = {v.name: [distance(v, seed) for seed in range(3)] for v in cross.variants}
    text = study_report(cross, write_rows(tmp_path / "rows.jsonl", cross, figures))
    effects = {line[0]: line for line in lines_of(text.split("## Effects")[1], "")}
    assert effects["mask none"][1:3] == ["mask paper", "4"]
    assert effects["mask none"][3].startswith("**+9.000")
    assert effects["weight none"][3].startswith("**+0.250")
    # 2, 2.1, 2.2: t = 2.1 / (0.1 / sqrt(3))
    assert effects["target next_level"][3] == "**+2.100 (t 36.4)**"


@pytest.mark.parametrize("name", ["filters", "fig4"])
def test_a_plot_from_rows(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = STUDIES[name]
    rows = write_rows(tmp_path / "r.jsonl", found, {v.name: [5.0, 6.0] for v in found.variants})
    save_plot(tmp_path / "plot.png", found, rows)
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="has no rows to draw"):
        save_plot(tmp_path / "none.png", found, Rows(tmp_path / "none.jsonl"))


# --- the command -------------------------------------------------------------------------------


def test_the_command(
    studio: Studio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.json").write_text(json.dumps({**TINY, "steps": 9}))
    output = tmp_path / "out" / "filters.jsonl"
    command = ["experiment", "filters", "--recipe", str(tmp_path / "tiny.json"), "--steps", "1"]
    command += ["--samples", "40", "--seeds", "0", "--data", str(studio.data)]
    command += ["--work", str(studio.work), "--output", str(output), "--backend", "torch"]
    assert cli.main([*command, "--trained"]) == 0
    said = capsys.readouterr()
    assert "left out: area_bicubic, seed 0; fourier, seed 0" in said.err
    assert cli.main([*command, "fourier"]) == 0
    assert "| fourier | 1 |" in capsys.readouterr().out
    assert {row["candidate"] for row in Rows(output).find(kind="images")} == {"fourier"}
    names = {"filters.jsonl", "filters.md", "filters.png", "filters-images.png"}
    assert {path.name for path in output.parent.iterdir()} >= names - {"filters.png"}

    text = output.with_suffix(".md").read_text()
    output.with_suffix(".md").unlink()
    alone = ["experiment", "filters", "report", "report", "--output", str(output)]
    assert cli.main([*alone, "--work", str(tmp_path / "none")]) == 0
    assert capsys.readouterr().out.strip() == text.strip()
    assert output.with_suffix(".md").read_text() == text
    assert cli.main(["experiment", "filters", "wavelets"]) == 2
    assert "it has ['area_bicubic', 'fourier', 'report']" in capsys.readouterr().err
    assert cli.main(["experiment", "filters", "--samples", "10", "--work", str(tmp_path)]) == 2
    assert "give at least 40" in capsys.readouterr().err
