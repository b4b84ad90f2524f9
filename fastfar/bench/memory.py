"""Highest memory of a subject, measured in a process of its own, so that nothing else is in it."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import torch

from fastfar import _memory
from fastfar.bench import rows
from fastfar.bench.far import COPIES, FARSubject
from fastfar.bench.rows import Row
from fastfar.bench.subjects import Choice, Recipe, described, far_recipes, select
from fastfar.bench.timing import FAILURES


@dataclass(frozen=True)
class Selection:
    """What recipes are made of; goes to another process, which recipes cannot.

    Attributes:
        selectors: see `fastfar.bench.subjects`; None: FAR by preset, forms and the choice.
        preset, forms: of FAR where there are no selectors.
        device: name of the device.
        choice: see there.
        threads: of the CPU.
    """

    selectors: tuple[str, ...] | None
    preset: str | None
    forms: tuple[str, ...] | None
    device: str
    choice: Choice
    threads: int

    def recipes(self) -> list[Recipe]:
        """In their order."""
        device = torch.device(self.device)
        if self.selectors is not None:
            return select(self.selectors, device, self.choice)
        return far_recipes(self.preset, self.forms, device, self.choice)


@dataclass(frozen=True)
class Use:
    """Bytes: held once the subject is built; highest while it makes images; None: not known."""

    built: int | None
    highest: int | None
    how: str


def use(selection: Selection, key: str, batch: int) -> Use:
    """Build the subject of this key and make a batch of images, in this process."""
    torch.set_num_threads(selection.threads)
    recipe = next(recipe for recipe in selection.recipes() if recipe.key == key)
    subject = recipe.build({"gate": False})
    labels_B, source = subject.labels(batch), subject.draw(batch)
    gc.collect()
    if subject.device.type == "cuda":
        cuda: Any = torch.cuda
        built = cuda.memory_allocated(subject.device)
        cuda.reset_peak_memory_stats(subject.device)
        subject.decode(subject.run(labels_B, source))
        cuda.synchronize(subject.device)
        return Use(built, cuda.max_memory_allocated(subject.device), "allocator of the GPU")
    # Packing and compiling belong to the first call; what they leave behind to the second.
    subject.decode(subject.run(labels_B, source))
    if isinstance(subject, FARSubject) and subject.form in COPIES:
        subject.weights.forget()
    gc.collect()
    alone = _memory.forget_highest()
    built = _memory.resident_bytes()
    subject.decode(subject.run(labels_B, source))
    highest = _memory.resident_bytes(highest=True)
    return Use(built, highest, "resident set" if alone else "resident set, building included")


def measure(
    selection: Selection,
    batches: Sequence[int],
    run: str,
    say: Callable[[str], object] = lambda _: None,
    alone: Callable[..., Use] | None = None,
) -> tuple[list[Row], dict[str, str]]:
    """Rows of memory alone, and key -> why a subject has none.

    Args:
        selection: what is measured.
        batches: numbers of images made at once.
        run: id of the run.
        say: takes lines for the user.
        alone: what stands in for `use` in a process of its own, in tests.
    """
    found: list[Row] = []
    skipped: dict[str, str] = {}
    context = rows.environment(selection.device)
    for recipe in selection.recipes():
        if recipe.reason is not None:
            skipped[recipe.key] = recipe.reason
            continue
        for batch in batches:
            say(f"{recipe.key}, batch {batch}: building it in a process of its own")
            try:
                taken = (alone or _apart)(selection, recipe.key, batch)
            except BrokenProcessPool:
                skipped[recipe.key] = "its process was ended from outside: out of memory?"
                break
            except FAILURES as error:
                skipped[recipe.key] = f"{type(error).__name__}: {error}"
                break
            found.append(_row(recipe, batch, taken, run, context))
    return found, skipped


def _apart(selection: Selection, key: str, batch: int) -> Use:
    """`use` in a new process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(use, selection, key, batch).result()


def _row(recipe: Recipe, batch: int, taken: Use, run: str, context: dict[str, Any]) -> Row:
    return Row(
        op="image",
        batch=batch,
        samples_s=(),
        run=run,
        environment=context,
        peak_memory_bytes=taken.highest,
        memory_note=f"{taken.how}, a process of its own, while it makes images",
        extra={"built_bytes": taken.built, "complete": True},
        **{**described(recipe.sketch), "extrapolation": None},
    )
