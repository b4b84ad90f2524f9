"""Experiments on a tiny model: the teacher's states, swapped steps, rows, gates and tables."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from formula import fill_by_formula
from idx import write_fashion_mnist
from tiny_run import TINY_FASHION

from fastfar import cli
from fastfar.config import FARConfig
from fastfar.diffusion import cosine_alpha_bar
from fastfar.evaluation import variance
from fastfar.evaluation.samples import image_generator
from fastfar.evaluation.variance import optimal_variance
from fastfar.experiments import FEWSTEP, Candidate, Part, Rows, Setting, diagnostics, fewstep
from fastfar.experiments.noise import CorrelatedNoise, pooled_cells
from fastfar.experiments.report import report
from fastfar.experiments.run import run_part
from fastfar.experiments.teacher import Teacher, draw_tokens, moments_of
from fastfar.levels import filter_matrices
from fastfar.model import FAR
from fastfar.noise import SeededNoise
from fastfar.pipeline import FARPipeline
from fastfar.plan import SamplingPlan
from fastfar.sampling import outer_steps
from fastfar.solver import Solver, schedule
from fastfar.tokenizer import PixelTokenizer

CONFIG = FARConfig.from_dict({**TINY_FASHION, "width": 16, "head_width": 16})


def tiny() -> FARPipeline:
    """Three masked outer steps; images of 32 x 32 pixels, 16 tokens of 64 numbers."""
    model = FAR(CONFIG).eval()
    fill_by_formula(model)
    with torch.no_grad():  # a variance channel far outside [-1, 1] would overflow
        model.head.final_layer.linear.weight *= 0.2
    plan = SamplingPlan(
        levels=(0, 2, 10),
        input_levels=(None, 2, 10),
        guidance_scale=2.0,
        guidance_ramp=(0.0, 0.5, 1.0),
        temperatures=(0.9, 0.9, 1.0),
        diffusion_steps=(2, 2, 2),
        mask_ratios=(1.0, 0.7, 0.3),
        x0_range=(-2.0, 2.0),
    )
    return FARPipeline(model, PixelTokenizer(-0.25, 0.5), plan)


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    (tmp_path / "data").mkdir()
    write_fashion_mnist(tmp_path / "data", train=10, test=60)
    return Setting(
        tiny(),
        tmp_path / "work",
        tmp_path / "rows.jsonl",
        samples=40,
        seeds=(0, 3),
        teacher_steps=4,
        conditions=20,
        draws=8,
        data=tmp_path / "data",
        backend="torch",
        batch_size=15,
    )


# --- the teacher -------------------------------------------------------------------------------


def test_the_runs_are_those_of_the_pipeline(setting: Setting) -> None:
    latents = setting.pipeline(
        [3, 4],
        plan=setting.teacher_plan,
        generator=[image_generator(0, 13), image_generator(0, 14)],
        output_type="latent",
        backend="torch",
    ).images
    found = Teacher(setting).latents_SBCHH
    assert found.shape == (3, 20, 1, 32, 32)
    torch.testing.assert_close(found[-1, 13:15], latents, atol=2e-3, rtol=1e-3)


def test_conditions_are_those_of_the_runs(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = Teacher(setting)
    seen = []
    with outer_steps(setting.pipeline.model, setting.teacher_plan, "torch") as step:
        kind = type(step)
    condition = kind.condition
    monkeypatch.setattr(
        kind, "condition", lambda *args: seen.append(condition(*args)) or seen[-1]
    )
    batch = dataclasses.replace(setting, batch_size=20, work=setting.work / "whole")
    Teacher(batch).latents_SBCHH  # noqa: B018
    monkeypatch.undo()
    for k, z_MLD in enumerate(seen):
        expected = z_MLD.view(-1, 20, *z_MLD.shape[1:])[:, torch.arange(20), teacher.token_B]
        assert teacher.conditions(k).shape == (1 if k == 0 else 2, 20, 16)
        torch.testing.assert_close(teacher.conditions(k), expected.float(), atol=0.06, rtol=0)


def test_runs_of_a_reference_are_read(setting: Setting, tmp_path: Path) -> None:
    folder = tmp_path / "R" / "0"
    folder.mkdir(parents=True)
    kept = torch.randn(3, 24, 1, 32, 32).half()
    np.save(folder / "000000-000012.lat.npy", kept[:, :12].numpy())
    np.save(folder / "000012-000024.lat.npy", kept[:, 12:].numpy())
    other = dataclasses.replace(setting, reference=tmp_path / "R")
    torch.testing.assert_close(Teacher(other).latents_SBCHH, kept[:, :20].float())


def test_draws_are_kept(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Teacher(setting).draws(2)
    assert first.shape == (20, 8, 64)
    monkeypatch.setattr(Teacher, "sample", None)
    torch.testing.assert_close(Teacher(setting).draws(2), first)


def test_moments_of_draws() -> None:
    turn = torch.linalg.qr(torch.randn(3, 3)).Q
    deviation = torch.tensor([0.5, 1.0, 2.0])
    mean = torch.randn(40, 1, 3)
    draws = mean + 0.8 * (torch.randn(40, 2000, 3) * deviation) @ turn.mT
    moments = moments_of(draws, temperature=0.8)
    torch.testing.assert_close(moments.mean_NP, mean[:, 0], atol=0.15, rtol=0)
    # Axes are sorted by eigenvalue and known up to their sign.
    torch.testing.assert_close((moments.basis_PP.mT @ turn).abs(), torch.eye(3), atol=0.05, rtol=0)
    assert moments.variance_NP.mean(dim=0).sqrt().tolist() == pytest.approx([0.5, 1, 2], rel=0.02)


def test_a_draw_from_moments(setting: Setting) -> None:
    plan = setting.teacher_plan.with_changes(
        diffusion_steps=1, solvers=Solver(method="moments"), x0_range=None
    )
    moments = moments_of(torch.randn(1, 500, 64) * 0.3 + 1.0, 1.0)
    many = type(moments)(
        moments.mean_NP.repeat(4000, 1), moments.variance_NP.repeat(4000, 1), moments.basis_PP
    )
    with outer_steps(setting.pipeline.model, plan, "torch") as step:
        generator = torch.Generator().manual_seed(0)
        x_NP = draw_tokens(step, 1, torch.zeros(2, 4000, 16), many, generator)
    torch.testing.assert_close(x_NP.mean(dim=0), moments.mean_NP[0], atol=0.03, rtol=0)
    expected = moments.basis_PP @ torch.diag(0.81 * moments.variance_NP[0]) @ moments.basis_PP.mT
    torch.testing.assert_close(x_NP.mT.cov(), expected, atol=0.02, rtol=0)


# --- variance tables ---------------------------------------------------------------------------


def test_optimal_variance_is_the_loss_of_the_model(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = setting.pipeline.model
    plan = setting.teacher_plan.with_changes(x0_range=None)
    latents, labels = torch.randn(30, 1, 32, 32) * 0.3, torch.arange(30) % 10
    known: dict[tuple[int, int], tuple[float, ...]] = {}
    measured = optimal_variance(model, latents, labels, plan, backend="torch", known=known)
    timesteps = schedule(Solver(), 4).timesteps
    assert set(known) == {(k, t) for k in range(3) for t in timesteps}
    table = measured.solvers[2].variance_table
    assert table is not None and (len(table), len(table[0])) == (4, 64)

    # The last outer step at its second timestep, from the head itself.
    t, plain = timesteps[1], plan.with_changes(guidance_scale=1.0)
    signal = float(cosine_alpha_bar()[t]) ** 0.5
    with outer_steps(model, plain, "torch", torch.float32) as step:
        inputs = variance.forced_inputs(step, labels, 0)
        z = step.condition(2, inputs, latents).flatten(0, 1)
        x0 = latents.view(30, 4, 8, 4, 8).transpose(2, 3).reshape(480, 64)
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(t))
        x = signal * x0 + (1 - signal**2) ** 0.5 * noise
        eps = model.head(x, torch.full((480,), t), z, torch.full((480,), 10.0))[:, :64]
    expected = ((eps - noise) / signal).square().mean(dim=0).clamp(max=1.2)
    torch.testing.assert_close(torch.tensor(table[1]), expected, atol=1e-4, rtol=1e-3)

    monkeypatch.setattr(variance, "fraction", None)  # everything is known
    again = optimal_variance(model, latents, labels, plan, backend="torch", known=known)
    assert again == measured
    ddim = plan.with_changes(solvers=Solver(method="ddim"))
    assert optimal_variance(model, latents, labels, ddim, backend="torch") == ddim
    with pytest.raises(ValueError, match="one label each"):
        optimal_variance(model, latents, labels[:3], plan)


# --- correlated noise --------------------------------------------------------------------------


def test_cells_are_what_the_filter_averages() -> None:
    # 4 tokens of 8 pixels a side: level 2 keeps 4 pixels a side, level 1 keeps 2.
    assert pooled_cells(CONFIG, 2).tolist() == list(range(16))
    assert pooled_cells(CONFIG, None).tolist() == list(range(16))
    assert pooled_cells(CONFIG, 1).view(4, 4).tolist() == [[0, 0, 1, 1]] * 2 + [[2, 2, 3, 3]] * 2


@pytest.mark.parametrize("r", [0.0, 0.3, 1.0])
def test_correlated_noise(r: float) -> None:
    plan = dataclasses.replace(tiny().plan, levels=(0, 1, 10), input_levels=(None, 1, 10))
    images = 300
    source = SeededNoise([(0, i) for i in range(images)], 16, 64)
    noise = CorrelatedNoise(source, plan, CONFIG, r)
    mixed = noise.initial(0).view(images, 16, 64)
    covariance = mixed.transpose(1, 2).reshape(-1, 16).mT.cov()
    cell = pooled_cells(CONFIG, 1)
    together = cell[:, None] == cell
    expected = torch.where(together, r, 0.0).fill_diagonal_(1.0)
    torch.testing.assert_close(covariance, expected, atol=0.04, rtol=0)
    assert noise.steps(0, 2).shape == (2, images * 16, 64)
    torch.testing.assert_close(noise.initial(1), source.initial(1))  # level 10: within tokens
    torch.testing.assert_close(noise.order(), source.order())
    with pytest.raises(ValueError, match="correlation is 2"):
        CorrelatedNoise(source, plan, CONFIG, 2.0)


# --- diagnostics -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    (
        "loss_by_time",
        "learned_fraction",
        "token_variance",
        "survival",
        "class_variance",
        "predicted_condition",
    ),
)
def test_diagnostics_are_finite(
    name: str, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnostics, "TIMESTEPS", (5, 500, 980))
    outcome = getattr(diagnostics, name)(setting)
    text = json.dumps(outcome)
    assert outcome and "NaN" not in text and "Infinity" not in text


def test_survival_of_white_noise_is_the_closed_form() -> None:
    matrix = filter_matrices(32, 16)[4]
    expected = float(matrix.square().sum() / 32) ** 2
    found = diagnostics._kept(torch.randn(200, 1, 32, 32), 4, 16, "area_bicubic")
    assert found == pytest.approx(expected, rel=0.03)


def test_ridge_finds_what_is_linear_and_nothing_else() -> None:
    inputs = torch.randn(40, 16, 5)
    linear = inputs @ torch.randn(5, 3) + 2.0
    assert diagnostics._ridge_r2(inputs, linear) > 0.999
    assert abs(diagnostics._ridge_r2(inputs, torch.randn(40, 16, 3))) < 0.1


# --- rows, gates, tables -----------------------------------------------------------------------


def a_part(setting: Setting, images: str = "gated") -> Part:
    plan = setting.teacher_plan

    def candidates(_: Setting) -> Sequence[Candidate]:
        broken = plan.with_changes(temperatures=(0.0,) * 3)
        again = Candidate("R again", plan, (2,), "always")
        return [again, Candidate("broken", broken, (2,), images)]

    said = (("answer", lambda setting: {"0": 42.0}),)
    return Part("E77", "Is it equal?", "R is.", "Equal.", candidates, said)


def test_a_part_makes_each_row_once(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    part, rows = a_part(setting), Rows(setting.output)
    run_part("test", part, setting, rows)
    kinds = [(row["candidate"], row["kind"], row["place"]) for row in rows]
    assert kinds[:2] == [("-", "diagnostic", "answer"), ("R again", "tokens", "2")]
    assert ("R again", "verdict", "all") in kinds and ("R", "yardstick", "pooled") in kinds
    # Images of a candidate whose tokens fail are not made.
    assert [kind for name, kind, _ in kinds if name == "broken"] == ["tokens"]
    (verdict,) = rows.find(kind="verdict")
    assert verdict["outcome"]["equal"]  # it draws the very images of R
    (failed,) = rows.find(candidate="broken")
    assert failed["outcome"]["all"]["variance_ratio"] < 0.9

    before = setting.output.read_text()
    monkeypatch.setattr(Teacher, "sample", None)
    monkeypatch.setattr("fastfar.experiments.images.draw_samples", None)
    run_part("test", part, setting, Rows(setting.output))
    assert setting.output.read_text() == before

    text = report("test", {"E77": part}, rows)
    assert "*Prediction.* R is." in text and "**yes**" in text and "| 0 | 42 |" in text
    assert "| broken | 2 | 4 |" in text


def test_rows_of_a_stopped_run(tmp_path: Path) -> None:
    path, name = tmp_path / "rows.jsonl", {"experiment": "e", "part": "p", "candidate": "c"}
    name |= {"kind": "tokens", "place": "1"}
    row, new = Rows(path).get(name, "key", lambda: {"x": 1})
    assert new and row["outcome"] == {"x": 1}
    with path.open("a") as stream:
        stream.write('{"experiment": "e", "pa')
    rows = Rows(path)
    assert rows.get(name, "key", lambda: {"x": 2}) == (row, False)
    # The same thing under another name is copied, another thing is made.
    assert rows.get({**name, "candidate": "d"}, "key", lambda: {"x": 2})[0]["outcome"] == {"x": 1}
    assert rows.get(name, "other", lambda: {"x": 3})[0]["outcome"] == {"x": 3}
    assert len(list(Rows(path))) == 2 and len(path.read_text().splitlines()) == 3


def test_a_reference_with_gaps_is_refused(setting: Setting, tmp_path: Path) -> None:
    (tmp_path / "R" / "0").mkdir(parents=True)
    np.save(tmp_path / "R/0/000000-000010.npy", np.zeros((10, 32, 32), np.uint8))
    setting.reference = tmp_path / "R"
    with pytest.raises(ValueError, match=r"holds images 0\.\.9 without a gap, 40 are asked for"):
        run_part("test", a_part(setting, "always"), setting, Rows(setting.output))


# --- the experiment as data --------------------------------------------------------------------


@pytest.mark.parametrize("name", FEWSTEP)
def test_candidates(name: str, setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are unique, and every sampler that is asked for can be built."""
    monkeypatch.setattr(fewstep, "VarianceTables", lambda setting: lambda plan: plan)
    setting.pipeline.plan = SamplingPlan.official("nomask")
    candidates = FEWSTEP[name].candidates(setting)
    names = [candidate.name for candidate in candidates]
    assert len(set(names)) == len(names) > 0
    for candidate in candidates:
        for solver, steps in zip(
            candidate.plan.solvers, candidate.plan.diffusion_steps, strict=True
        ):
            if solver.method != "moments":
                assert len(schedule(solver, steps)) == steps


def test_the_command(
    tmp_path: Path, setting: Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = Rows(setting.output)
    rows.get(
        {"experiment": "fewstep", "part": "E0", "candidate": "-", "kind": "diagnostic"}
        | {"place": "survival"},
        "key",
        lambda: {"3": {"white": 0.5}},
    )
    assert cli.main(["experiment", "fewstep", "report", "--output", str(setting.output)]) == 0
    text = capsys.readouterr().out
    assert "## E0: " in text and "| 3 | white 0.5 |" in text and "## E1" not in text
    assert cli.main(["experiment", "fewstep", "E55"]) == 2
    assert "it has ['E0'" in capsys.readouterr().err
    assert json.loads(setting.output.read_text())["place"] == "survival"


@pytest.mark.parametrize("total, count", [(10, 10), (14, 10), (40, 10), (60, 11), (7, 1)])
def test_rising_steps(total: int, count: int) -> None:
    steps = fewstep.rising_steps(total, count)
    assert sum(steps) == total and len(steps) == count and min(steps) >= 1
    assert list(steps) == sorted(steps)
    even = fewstep.rising_steps(total, count, growth=1.0)
    assert sum(even) == total and max(even) - min(even) <= 1
    with pytest.raises(ValueError, match="too few for"):
        fewstep.rising_steps(count - 1, count)
