"""Whole images of candidates and of R, judged alike, and whether they are equal.

Legend: B image, H height, W width.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastfar.data import balanced_labels, load_fashion_mnist
from fastfar.evaluation import METRIC, Judge, SampleStore, draw_samples, extract, load_classifier
from fastfar.evaluation import Row as Judged
from fastfar.evaluation.equality import POOLED, decide, fd_spread
from fastfar.evaluation.samples import digest, read_chunks, weights_fingerprint
from fastfar.experiments.base import Candidate, Row, Rows, Setting
from fastfar.experiments.noise import WithCorrelation

R = "R"


@lru_cache(maxsize=1)
def judge_of(data: Path | None) -> Judge:
    """Against the test split of Fashion-MNIST; its features are computed once."""
    return Judge(load_classifier(), load_fashion_mnist("test", data))


class Images:
    """Draws, scores and compares; all that is done lies in the work folder and in the rows."""

    def __init__(self, setting: Setting, rows: Rows, experiment: str) -> None:
        self.setting, self.rows, self.experiment = setting, rows, experiment
        self.reference = Candidate(R, setting.teacher_plan)

    @property
    def judge(self) -> Judge:
        return judge_of(self.setting.data)

    def compare(self, part: str, candidate: Candidate) -> Row:
        """The verdict on a candidate, after its rows and R's for every seed and pooled."""
        theirs, spread = self.scores(R, self.reference), self._yardstick()
        ours = self.scores(part, candidate)
        name = self._name(part, candidate, "verdict", "all")
        judged = [[row.to_dict() for row in scores.values()] for scores in (ours, theirs)]
        key = digest([judged, spread])
        row, _ = self.rows.get(name, key, lambda: decide(theirs, ours, spread).to_dict())
        return row

    def scores(self, part: str, candidate: Candidate) -> dict[str, Judged]:
        """The figures of a candidate for every seed and, of several, pooled; a row for each."""
        scores = {}
        for place in self._places():
            name = self._name(part, candidate, "images", place)

            def score(place: str = place) -> Row:
                images_BHW, labels_B = self._images(candidate, place)
                self.setting.tell(f"judging {candidate.name}, seed {place}")
                return self.judge.score(candidate.name, "samples", images_BHW, labels_B).to_dict()

            row, _ = self.rows.get(name, self._key(candidate, place), score)
            scores[place] = _judged(row["outcome"])
        return scores

    def _yardstick(self) -> dict[str, float]:
        """q of R by seed and pooled."""
        spread = {}
        for place in self._places():

            def measure(place: str = place) -> Row:
                images_BHW, _ = self._images(self.reference, place)
                features_BF, _ = extract(self.judge.classifier, images_BHW)
                features = features_BF.numpy().astype("float64")
                return {"q": fd_spread(features, self.judge.statistics)}

            name = self._name(R, self.reference, "yardstick", place)
            row, _ = self.rows.get(name, self._key(self.reference, place), measure)
            spread[place] = row["outcome"]["q"]
        return spread

    def _places(self) -> list[str]:
        seeds = [str(seed) for seed in self.setting.seeds]
        return [*seeds, POOLED] if len(seeds) > 1 else seeds

    def _images(self, candidate: Candidate, place: str) -> tuple[Tensor, Tensor]:
        seeds = self.setting.seeds if place == POOLED else (int(place),)
        drawn = [self.draw(candidate, seed) for seed in seeds]
        labels_B = balanced_labels(self.setting.samples)
        return torch.cat(drawn), labels_B.repeat(len(seeds))

    def draw(self, candidate: Candidate, seed: int) -> Tensor:
        """uint8 (B, H, W) of one seed, read where they are there."""
        setting = self.setting
        if candidate.name == R and setting.reference is not None:
            images_BHW, there_B = read_chunks(setting.reference / str(seed), setting.samples)
            if not bool(there_B.all()):
                missing = int((~there_B).nonzero()[0])
                raise ValueError(
                    f"{setting.reference / str(seed)} holds images 0..{missing - 1} without a gap, "
                    f"{setting.samples} are asked for: give --samples {missing // 100 * 100}, or "
                    "leave --reference out to draw them"
                )
            return images_BHW
        identity = self._identity(candidate, seed)
        folder = setting.work / "images" / digest(identity)
        pipeline: Any = setting.pipeline
        if candidate.correlation:
            pipeline = WithCorrelation(setting.pipeline, candidate.correlation)
        images_BHW, _, _ = draw_samples(
            pipeline,
            setting.samples,
            SampleStore(folder, identity),
            batch_size=setting.batch_size,
            seed=seed,
            progress=lambda done, total: setting.tell(
                f"{candidate.name}, seed {seed}: {done} of {total} images"
            ),
            plan=candidate.plan,
            backend=setting.backend,
        )
        return images_BHW

    def _identity(self, candidate: Candidate, seed: int) -> Row:
        identity: Row = {"weights": self.setting.weights, "plan": candidate.plan.to_dict()}
        identity |= {"seed": seed, "correlation": candidate.correlation}
        if any(solver.needs_moments for solver in candidate.plan.solvers):
            head = self.setting.pipeline.moments
            identity["moments"] = None if head is None else weights_fingerprint(head)
        return identity

    def _key(self, candidate: Candidate, place: str) -> str:
        seeds = self.setting.seeds if place == POOLED else (int(place),)
        drawn = [self._identity(candidate, seed) for seed in seeds]
        return digest([drawn, self.setting.samples, self.judge.extractor])

    def _name(self, part: str, candidate: Candidate, kind: str, place: str) -> Row:
        return {
            "experiment": self.experiment,
            "part": part,
            "candidate": candidate.name,
            "kind": kind,
            "place": place,
            "head_calls": candidate.plan.head_calls,
            "samples": self.setting.samples,
            "checkpoint": self.setting.checkpoint,
            "correlation": candidate.correlation,
            "plan": candidate.plan.to_dict(),
            **self.setting.about,
        }


def _judged(outcome: Row) -> Judged:
    values = dict(outcome)
    return Judged(fd=values.pop(METRIC), **values)
