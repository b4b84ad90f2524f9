"""What every experiment is made of: parts, their candidates, and the rows of their outcomes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fastfar.bench.rows import append
from fastfar.evaluation.samples import weights_fingerprint
from fastfar.pipeline import FARPipeline
from fastfar.plan import SamplingPlan

Row = dict[str, Any]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Candidate:
    """One sampler to be judged against R.

    Attributes:
        name: what the tables call it; unique within its part.
        plan: what it does.
        token_steps: outer steps whose tokens are compared with the teacher's, given its conditions.
        images: "always", "never", or "gated": only if all `token_steps` pass.
        correlation: of the noise of tokens that the next input averages; 0 leaves it independent.
    """

    name: str
    plan: SamplingPlan
    token_steps: tuple[int, ...] = ()
    images: str = "gated"
    correlation: float = 0.0

    def __post_init__(self) -> None:
        if self.images not in ("always", "gated", "never"):
            raise ValueError(f"images must be always, gated or never, got {self.images!r}")


@dataclass(frozen=True)
class Part:
    """One question of an experiment.

    Attributes:
        name: as on the command line.
        question, prediction, rule: written before the run; `rule` says what passes.
        candidates: of a setting, in the order in which they are judged.
        diagnostics: further rows that are no candidate's: (name, function) pairs.
        most_images: of the gated candidates whose tokens pass, those with the fewest head calls
            (then the lowest energy distance) make images, at most this many.
    """

    name: str
    question: str
    prediction: str
    rule: str
    candidates: Callable[[Setting], Sequence[Candidate]] = lambda setting: ()
    diagnostics: tuple[tuple[str, Callable[[Setting], Row]], ...] = ()
    most_images: int = 4


@dataclass
class Setting:
    """What an experiment runs on.

    Attributes:
        pipeline: model, tokenizer and published plan.
        work: folder of everything that is drawn once.
        output: JSONL file of the rows.
        samples, seeds: images per seed.
        teacher_steps: T of R.
        conditions, draws: of the token metrics, for every outer step.
        reference: folder of R's images, one folder a seed; None draws them into `work`.
        data: folder of Fashion-MNIST's files, if it is not installed.
        backend: see `fastfar.sample_latents`.
        checkpoint: name of the pipeline's.
        images: whether images are made and judged, which needs Fashion-MNIST; tokens do not.
        batch_size: images at a time.
        about: what the rows of images say besides, of a model that an experiment trained.
        tell: is told what is being done.
    """

    pipeline: FARPipeline
    work: Path
    output: Path
    samples: int = 5000
    seeds: tuple[int, ...] = (0, 1, 2)
    teacher_steps: int = 100
    conditions: int = 256
    draws: int = 256
    reference: Path | None = None
    data: Path | None = None
    backend: str = "auto"
    checkpoint: str = "demo"
    images: bool = True
    batch_size: int = 100
    about: Row = field(default_factory=dict)
    tell: Tell = field(default=lambda text: None)

    @cached_property
    def weights(self) -> str:
        """Fingerprint of the model."""
        return weights_fingerprint(self.pipeline.model)

    @cached_property
    def teacher_plan(self) -> SamplingPlan:
        """R: the pipeline's plan with the published solver at T = `teacher_steps`."""
        return self.pipeline.plan.with_changes(diffusion_steps=self.teacher_steps)


class Rows:
    """A JSONL file of rows, each appended as soon as it is known.

    A row is named by (part, candidate, kind, place) and carries the `key` of what was done: a row
    that is there is not made again, and what another candidate has shown is copied.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: dict[tuple[str, ...], Row] = {}
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            if text and not text.endswith("\n"):  # stopped while writing: that row is made again
                text = text[: text.rfind("\n") + 1]
                path.write_text(text, encoding="utf-8")
            for line in text.splitlines():
                self._keep(json.loads(line))

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def _keep(self, row: Row) -> None:
        self._rows[_name(row)] = row  # the last one of a name counts

    def find(self, **named: Any) -> list[Row]:
        """Rows whose entries are these."""
        return [row for row in self if all(row.get(k) == v for k, v in named.items())]

    def get(self, name: Row, key: str, make: Callable[[], Row]) -> tuple[Row, bool]:
        """The row of `name` for `key`, and whether it is new; `make` gives what it says."""
        kept = self._rows.get(_name(name))
        if kept is not None and kept["key"] == key:
            return kept, False
        same = next(iter(self.find(kind=name["kind"], place=name["place"], key=key)), None)
        said = same["outcome"] if same is not None else make()
        row = {**name, "key": key, "outcome": said}
        append(self.path, [row])
        self._keep(row)
        return row, True


def _name(row: Row) -> tuple[str, ...]:
    return tuple(str(row[k]) for k in ("experiment", "part", "candidate", "kind", "place"))
