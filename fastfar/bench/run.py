"""A run: every subject is called cold, checked, then timed in rounds in which all take turns.

For each group of subjects that fit into memory together: build them; of each the first call (the
cold start, to pixels), the gate, the seconds of its stages; then `repeats` rounds, one sample of
each subject a round, the machine's peak around every sample; a row as soon as a subject has its
last sample. Where a run is interrupted, what was measured so far is written as rows that say so
(`extra["complete"]` is False), and a run that resumes measures those again.
"""

from __future__ import annotations

import datetime
import gc
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastfar import profiling
from fastfar.bench import peak, rows, stages
from fastfar.bench.estimate import Estimate, estimate, kernels_of
from fastfar.bench.far import FARSubject
from fastfar.bench.gate import Gate
from fastfar.bench.head_kernels import head_kernels
from fastfar.bench.rows import Row
from fastfar.bench.subjects import Recipe, Subject, described, timed_run
from fastfar.bench.tables import duration
from fastfar.bench.timing import FAILURES, Contender, Timer, alternate, now

# Forms that convert, compile and capture nothing: their first call shows their stages as well.
PLAIN = ("reference", "autocast", "published")
TRITON = ("eager", "triton")
PROFILED_KERNELS = 60_000  # more than that many are not taken apart by a profiler


@dataclass(frozen=True)
class Options:
    """What a run does.

    Attributes:
        mode: of the command: "latency", "throughput", "table3", ...
        batches: sizes, one after the other.
        repeats: timed calls of each subject at each size.
        save: JSONL file to append rows to, or None.
        resume: take up the last run of `save` that has the same settings.
        trace: file for a Chrome trace of one run of the last subject, or None.
        nvtx: ranges for an attached profiler during the timed calls.
        kernels: on a GPU, also time the kernels of the head alone; cold_kernels: out of L2.
        stages: take one call of each subject apart.
    """

    mode: str = "latency"
    batches: tuple[int, ...] = (1,)
    repeats: int = 5
    save: Path | None = None
    resume: bool = False
    trace: Path | None = None
    nvtx: bool = False
    kernels: bool = False
    cold_kernels: bool = False
    stages: bool = True


@dataclass
class Outcome:
    """What came of a run.

    Attributes:
        rows: of the whole run; resumed ones first.
        skipped: key -> why it was not measured.
        estimate: what was expected; None where there was nothing to do.
    """

    rows: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    estimate: Estimate | None = None

    @property
    def red(self) -> list[Row]:
        """Rows whose result is wrong."""
        return [row for row in self.rows if row.gate == "red"]


@dataclass
class _Ready:
    """A built subject with what came before its rounds."""

    subject: Subject
    gate: Gate
    cold_s: float | None
    stages: Mapping[str, float]
    extra: dict[str, Any]


def run(
    recipes: Sequence[Recipe],
    options: Options,
    device: torch.device | str,
    say: Callable[[str], object] = lambda _: None,
    anchor: Recipe | None = None,
    plan: Callable[..., Estimate] = estimate,
) -> Outcome:
    """Measure all recipes that can run here; see above.

    Args:
        recipes: in the order of the table, slow baselines first.
        options: see there.
        device: that they run on.
        say: takes lines for the user: the estimate beforehand, then each step.
        anchor: a recipe that is built in every group; see `estimate`.
        plan: makes the groups; `estimate`.

    Raises:
        ValueError: a model does not fit into memory, or nothing can be resumed without a file.
    """
    device, outcome = torch.device(device), Outcome()
    settings = settings_of(options, device)
    name = new_id(options.mode)
    if options.resume:
        if options.save is None:
            raise ValueError("--resume needs --save FILE: the file that the run was saved to")
        name, outcome.rows = resumed(options.save, settings, name)
        say(f"run {name}: {len(outcome.rows)} rows are there already" if outcome.rows
            else f"nothing to resume in {options.save}: a new run")  # fmt: skip
    done = {(row.subject, row.batch) for row in outcome.rows}
    left: list[Recipe] = []
    for recipe in recipes:
        if recipe.reason is not None:
            outcome.skipped[recipe.key] = recipe.reason
        elif not all((recipe.key, batch) in done for batch in options.batches):
            left.append(recipe)
    if not left:
        return outcome
    if anchor is not None and anchor.reason is not None:
        anchor = None
    outcome.estimate = plan(left, options.batches, options.repeats, device, anchor)
    say(outcome.estimate.text(options.repeats))
    context = rows.environment(device)
    for number, group in enumerate(outcome.estimate.groups):
        _Group(number, group, options, device, say, outcome, anchor, done,
               {"run": name, "environment": context,
                "round_grain": "subject" if len(outcome.estimate.groups) == 1 else "group"},
               settings).measure()  # fmt: skip
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return outcome


def new_id(mode: str) -> str:
    """Id of a run: its mode, the time, and a few digits against chance."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return f"{mode}-{now:%Y%m%dT%H%M%S}-{secrets.token_hex(2)}"


def settings_of(options: Options, device: torch.device) -> dict[str, Any]:
    """What two parts of one run must have in common."""
    commit, dirty = rows.commit()
    return {
        "mode": options.mode,
        "repeats": options.repeats,
        "threads": torch.get_num_threads(),
        "device": str(device),
        "commit": commit,
        "dirty": dirty,
        "torch": torch.__version__,
    }


def resumed(path: Path, settings: Mapping[str, Any], fresh: str) -> tuple[str, list[Row]]:
    """Id and complete rows of the last run of a file that has these settings; `fresh` if none."""
    if not path.is_file():
        return fresh, []
    alike = [row for row in rows.read(path) if row.extra.get("settings") == dict(settings)]
    if not alike:
        return fresh, []
    name = alike[-1].run
    return name, [row for row in alike if row.run == name and row.extra.get("complete")]


class _Group:
    """Subjects that are resident together, from building to rows."""

    def __init__(
        self,
        number: int,
        recipes: Sequence[Recipe],
        options: Options,
        device: torch.device,
        say: Callable[[str], object],
        outcome: Outcome,
        anchor: Recipe | None,
        done: set[tuple[str, int]],
        common: dict[str, Any],
        settings: dict[str, Any],
    ) -> None:
        self.number, self.recipes, self.options, self.device = number, recipes, options, device
        self.say, self.outcome, self.done, self.settings = say, outcome, done, settings
        self.anchor = None if anchor is None else anchor.key
        self.common = common

    def measure(self) -> None:
        """All of it."""
        ready = self._prepare()
        if not ready:
            return
        for batch in self.options.batches:
            todo = [
                each for each in ready
                if (each.subject.key, batch) not in self.done or each.subject.key == self.anchor
            ]  # fmt: skip
            if any((each.subject.key, batch) not in self.done for each in todo):
                _Rounds(self, todo, batch).measure()
        if self.options.trace is not None:
            self._trace(ready[-1].subject)

    # --- before the rounds -------------------------------------------------------------------

    def _prepare(self) -> list[_Ready]:
        shared: dict[str, Any] = {}
        built: list[Subject] = []
        for recipe in self.recipes:
            self.say(f"building {recipe.key}")
            try:
                built.append(recipe.build(shared))
            except FAILURES as error:
                self._skip(recipe.key, error)
        ready = []
        for subject in built:
            try:
                each = self._first(subject)
            except FAILURES as error:
                self._skip(subject.key, error)
                continue
            ready.append(each)
            cold = "not timed" if each.cold_s is None else duration(each.cold_s)
            error_text = "-" if each.gate.error is None else f"{each.gate.error:.1e}"
            self.say(f"{subject.title}: first call {cold}, error {error_text}"
                     + ("" if each.gate.error is None or each.gate.green
                        else ", THE GATE IS RED: no ratio will be given"))  # fmt: skip
        return ready

    def _skip(self, key: str, error: Exception) -> None:
        self.outcome.skipped[key] = f"{type(error).__name__}: {error}"
        self.say(f"{key} is left out: {self.outcome.skipped[key]}")

    def _first(self, subject: Subject) -> _Ready:
        batch = self.options.batches[0]
        labels_B, source = subject.labels(batch), subject.draw(batch)
        found: dict[str, float] = {}
        cold: float | None = None

        def call() -> None:
            subject.decode(subject.run(labels_B, source))

        on_cpu = self.device.type == "cpu"
        start = now(self.device)
        if subject.form in PLAIN and on_cpu and self.options.stages:
            found = stages.profile(call, self.device).stages
        else:
            call()
        cold = now(self.device) - start
        gate = subject.check()
        if not found and self._takes_apart(subject):
            found = stages.profile(call, self.device).stages
        if subject.extrapolation is not None:
            cold, found = None, _scaled(subject, found)
        extra: dict[str, Any] = {"complete": False, "settings": self.settings}
        if self.options.kernels and isinstance(subject, FARSubject) and subject.form in TRITON:
            times = head_kernels(subject, batch, self.options.cold_kernels)
            extra["head_kernels"] = [vars(time) for time in times]
        return _Ready(subject, gate, cold, found, extra)

    def _takes_apart(self, subject: Subject) -> bool:
        on_gpu = self.device.type == "cuda"
        small = not on_gpu or kernels_of(subject) <= PROFILED_KERNELS
        return self.options.stages and small

    def _trace(self, subject: Subject) -> None:
        labels_B, source = subject.labels(1), subject.draw(1)
        with profiling.trace(self.options.trace):
            subject.decode(subject.run(labels_B, source))
        self.say(f"trace of one run of {subject.title}: {self.options.trace}")


class _Rounds:
    """The timed calls of a group at one batch size."""

    def __init__(self, group: _Group, ready: Sequence[_Ready], batch: int) -> None:
        self.group, self.batch = group, batch
        self.ready = {each.subject.key: each for each in ready}
        self.parts: dict[str, list[tuple[float, float]]] = {key: [] for key in self.ready}
        self.memory: dict[str, int] = {}
        self.last = ""
        self.contenders = {key: self._contender(each) for key, each in self.ready.items()}
        self.written: set[str] = set()

    def measure(self) -> None:
        """Rounds, with a row as soon as a subject has its last sample."""
        group = self.group
        with ExitStack() as stack:
            if group.options.nvtx:
                stack.enter_context(profiling.ranges())
            if self.batch != group.options.batches[0]:
                for contender in self.contenders.values():
                    if contender.run is not None:
                        contender.run()  # shapes that are new
            try:
                alternate(list(self.contenders.values()), group.options.repeats, group.device,
                          progress=self._after)  # fmt: skip
            except BaseException:
                for key, contender in self.contenders.items():
                    if contender.samples and key not in self.written:
                        self._write(key, complete=False)
                raise

    def _contender(self, ready: _Ready) -> Contender:
        subject, device, batch = ready.subject, self.group.device, self.batch
        labels_B = subject.labels(batch)
        source = subject.draw(batch)

        def seconds() -> float:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            tokens, first = timed_run(subject, labels_B, source)
            start = now(device)
            subject.decode(tokens)
            second = now(device) - start
            self.parts[subject.key].append((first, second))
            self.last = subject.key
            if device.type == "cuda":
                # The largest of all turns: a replay alone does not show what its capture holds.
                used = torch.cuda.max_memory_allocated(device)
                self.memory[subject.key] = max(self.memory.get(subject.key, 0), used)
            return first + second

        return Contender(
            subject.key,
            subject.dtype,
            lambda: subject.decode(subject.run(labels_B, source)),
            executed=subject.executed_flops(batch) or 0,
            error=ready.gate.error,
            limit=ready.gate.limit,
            cold_s=ready.cold_s,
            timer=Timer("wall", seconds),
        )

    def _after(self) -> None:
        key = self.last
        samples = self.contenders[key].samples
        self.group.say(
            f"{self.ready[key].subject.title}, batch {self.batch}, "
            f"{len(samples)} of {self.group.options.repeats}: {duration(samples[-1].seconds)}"
        )
        if len(samples) == self.group.options.repeats:
            self._write(key, complete=True)

    def _write(self, key: str, complete: bool) -> None:
        self.written.add(key)
        if (key, self.batch) in self.group.done:  # the anchor, once again
            return
        row = self._row(self.ready[key], complete)
        if complete:
            self.group.done.add((key, self.batch))
        self.group.outcome.rows.append(row)
        if self.group.options.save is not None:
            rows.append(self.group.options.save, [row])

    def _row(self, ready: _Ready, complete: bool) -> Row:
        subject, batch, group = ready.subject, self.batch, self.group
        samples = self.contenders[subject.key].samples
        parts = self.parts[subject.key][: len(samples)]
        extra = {**ready.extra, "complete": complete, "group": group.number}
        if isinstance(subject, FARSubject):
            extra["stage_flops"] = subject.stage_flops(batch)
        beside = None if group.anchor is None else self.contenders.get(group.anchor)
        if beside is not None and beside.samples:
            # Ratios of one group are taken over calls that took turns with it.
            taken = [sample.seconds for sample in beside.samples]
            extra["anchor"] = {"subject": group.anchor, "samples_s": taken}
        notes = [] if complete else [f"interrupted after {len(samples)} rounds"]
        memory = self.memory.get(subject.key)
        return Row(
            op="image",
            batch=batch,
            samples_s=tuple(sample.seconds for sample in samples),
            tokens_samples_s=tuple(first for first, _ in parts),
            decode_samples_s=tuple(second for _, second in parts),
            cold_s=ready.cold_s if batch == group.options.batches[0] else None,
            peak_flops_per_s=tuple(sample.peak for sample in samples),
            peak_kind=peak.kind(subject.dtype, group.device),
            reference_flops=subject.reference_flops(batch),
            executed_flops=subject.executed_flops(batch),
            error=ready.gate.error,
            error_limit=ready.gate.limit,
            gate_note=ready.gate.note,
            stages_s=ready.stages if batch == group.options.batches[0] else {},
            peak_memory_bytes=memory,
            memory_note="" if memory is None else "allocator, all subjects resident",
            note="; ".join(notes),
            extra=extra,
            **described(subject),
            **group.common,
        )


def _scaled(subject: Subject, found: Mapping[str, float]) -> dict[str, float]:
    """Stages of a run of some steps, as of all of them; decoding was run whole."""
    timed = getattr(subject, "timed_steps", None)
    factor = subject.steps / len(timed) if timed else 1.0
    return {name: s if name == stages.DECODE else s * factor for name, s in found.items()}
