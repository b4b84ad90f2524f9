"""One part of an experiment, from its candidates to its rows."""

from __future__ import annotations

from functools import partial

import torch

from fastfar.evaluation.samples import digest
from fastfar.evaluation.tokens import token_report
from fastfar.experiments.base import Candidate, Part, Row, Rows, Setting
from fastfar.experiments.images import Images
from fastfar.experiments.teacher import Teacher, swapped


def run_part(experiment: str, part: Part, setting: Setting, rows: Rows) -> None:
    """Make every row of the part that is not there yet; stopped, it goes on where it was."""
    teacher, images = Teacher(setting), Images(setting, rows, experiment)
    for name, diagnose in part.diagnostics if setting.images else ():
        setting.tell(f"{part.name}: {name}")
        row: Row = {"experiment": experiment, "part": part.name, "candidate": "-"}
        row |= {"kind": "diagnostic", "place": name}
        rows.get(row, digest(teacher.identity), partial(diagnose, setting))
    gated = []
    for candidate in part.candidates(setting):
        judged = [
            _token_row(experiment, part, candidate, k, teacher, rows) for k in candidate.token_steps
        ]
        if not setting.images:
            continue
        if candidate.images == "always":
            images.compare(part.name, candidate)
        elif candidate.images == "gated" and all(metrics["passes"] for metrics in judged):
            energy = sum(metrics["ratio"] for metrics in judged)
            gated.append((candidate.plan.head_calls, energy, candidate))
    for _, _, candidate in sorted(gated, key=lambda entry: entry[:2])[: part.most_images]:
        images.compare(part.name, candidate)


def _token_row(
    experiment: str, part: Part, candidate: Candidate, k: int, teacher: Teacher, rows: Rows
) -> Row:
    """Metrics of the candidate's tokens of outer step k, given the teacher's conditions."""
    plan, setting = candidate.plan, teacher.setting
    source = teacher.moment_source() if plan.solvers[k].needs_moments else None
    name: Row = {
        "experiment": experiment,
        "part": part.name,
        "candidate": candidate.name,
        "kind": "tokens",
        "place": str(k),
        "level": plan.levels[k],
        "diffusion_steps": plan.diffusion_steps[k],
        "moments": source,
    }

    def judge() -> Row:
        setting.tell(f"{part.name}: {candidate.name}, tokens of outer step {k}")
        drawn_ZMP = teacher.sample(plan, k, setting.draws // 2)
        if not bool(torch.isfinite(drawn_ZMP).all()):
            return {"all": {"passes": False, "diverged": True}}
        report = token_report(teacher.draws(k), drawn_ZMP)
        return {subset: metrics.to_dict() for subset, metrics in report.items()}

    key = digest([teacher.identity, swapped(teacher.plan, plan, k), source])
    row, _ = rows.get(name, key, judge)
    metrics: Row = row["outcome"]["all"]
    return metrics
