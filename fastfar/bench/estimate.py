"""Before a run: how long it will take, how much memory it needs, what fits in together.

    seconds = FLOPs / (peak * what a form usually reaches of it) + weight bytes * steps / bandwidth
              + kernels * time to launch one (GPU, but for graphs)

An order of magnitude; the run itself says better once every subject has been called once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fastfar import backend as backends
from fastfar.bench import peak
from fastfar.bench.baseline import BaselineSubject
from fastfar.bench.far import FARSubject
from fastfar.bench.subjects import Recipe, Subject
from fastfar.bench.tables import duration, size

# Shares of the peak that forms reach, from earlier runs on two AMX cores.
REACHED = {"reference": 0.5, "autocast": 0.12, "torch": 0.25, "compile": 0.3, "native": 0.4,
           "eager": 0.3, "triton": 0.4, "published": 0.15, "well_run": 0.25}  # fmt: skip
LAUNCH_SECONDS = 7e-6
MAR_HEAD = 0.16  # share of its head in MAR's parameters
STREAMED = 128 << 20  # bytes read to measure the bandwidth: enough for an order of magnitude
DEFAULT_BANDWIDTH = 10e9  # where there is no way to measure it
ACTIVATIONS = 300 << 20  # of one image, the decoder's above all
RUNTIME = 700 << 20  # PyTorch, the compiler, what allocators keep
SPARE = 0.95  # of the memory that is available


@dataclass(frozen=True)
class Need:
    """What a subject takes.

    Attributes:
        seconds: of one run at a batch of one.
        flops_seconds: the part of it that grows with the batch.
        run_share: of a whole run that is really run (extrapolated subjects: less than 1).
        resident: bytes of its own weights; shared: of what its family shares.
        passing: bytes of copies that exist while it runs.
    """

    seconds: float
    flops_seconds: float
    run_share: float
    resident: int
    shared: int
    passing: int

    def at(self, batch: int) -> float:
        """Seconds that one timed call really takes."""
        return self.run_share * (self.seconds + (batch - 1) * self.flops_seconds)


class Machine:
    """Rates of this machine now: FLOP/s by dtype, bytes/s."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._peaks: dict[torch.dtype, float] = {}
        try:
            self.bandwidth = peak.bandwidth(device, size=STREAMED, repeats=1)
        except OSError:
            self.bandwidth = DEFAULT_BANDWIDTH

    def peak(self, dtype: torch.dtype) -> float:
        """FLOP/s."""
        if dtype not in self._peaks:
            self._peaks[dtype] = peak.peak_flops(dtype, self.device)
        return self._peaks[dtype]


def need(subject: Subject, machine: Machine) -> Need:
    """Of a subject, which may be a sketch."""
    itemsize = subject.dtype.itemsize
    flops = subject.executed_flops(1) or subject.reference_flops(1)
    arithmetic = flops / (machine.peak(subject.dtype) * REACHED[subject.form])
    moved = subject.num_parameters * itemsize * subject.steps * _times_read(subject)
    launching = kernels_of(subject) * LAUNCH_SECONDS if machine.device.type == "cuda" else 0.0
    run_share, shared, passing = 1.0, 0, 0
    if isinstance(subject, BaselineSubject):
        resident = subject.weight_bytes()
        if subject.form == "published" and subject.model.startswith("mar"):
            passing = subject.num_parameters * itemsize  # copies that autocast makes and keeps
        if subject.timed_steps is not None:
            run_share = len(subject.timed_steps) / subject.steps
    else:
        resident, shared, passing = _far_bytes(subject)
    seconds = arithmetic + moved / machine.bandwidth + launching
    return Need(seconds, arithmetic, run_share, resident, shared, passing)


def _far_bytes(subject: Subject) -> tuple[int, int, int]:
    """Own, shared and passing bytes: of FAR the float32 model and its decoder are shared."""
    assert isinstance(subject, FARSubject)
    weights = subject.weights
    decoder = 0
    if isinstance(weights.tokenizer, torch.nn.Module):
        decoder = 4 * sum(p.numel() for p in weights.tokenizer.parameters())
    shared = 4 * subject.num_parameters + decoder
    own = subject.num_parameters * subject.dtype.itemsize
    if subject.form == "reference":
        return 0, shared, 0
    if subject.form == "autocast":
        return 0, shared, own
    return own + 2 * decoder, shared, 0


def _times_read(subject: Subject) -> float:
    """How often a step reads its weights: VAR as published casts them, MAR's head runs T times."""
    if subject.key.startswith("var") and subject.form == "published":
        return 4.0  # float32, written and read in 16 bits
    return 1.0 + MAR_HEAD * 100 if subject.key.startswith("mar") else 1.0


def kernels_of(subject: Subject) -> float:
    """About how many kernels one image launches."""
    if isinstance(subject, FARSubject):
        per_step = {"triton": 0, "compile": 4, "eager": 8}.get(subject.form, 100)
        return per_step * subject.sampling_plan.head_calls
    per_outer_step = {"mar": 12_000, "llamagen": 900, "var": 800}
    return per_outer_step[subject.model.split("_")[0]] * subject.steps


# --- what is resident together ---------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """Of a whole run.

    Attributes:
        groups: recipes that are built and timed together, one group after the other.
        seconds: of all of it, building included.
        bytes: of the largest group.
        available: bytes; None where that cannot be asked.
    """

    groups: list[list[Recipe]]
    seconds: float
    bytes: int
    available: int | None

    def text(self, repeats: int) -> str:
        """A sentence for the user."""
        subjects = len({recipe.key for group in self.groups for recipe in group})
        have = "" if self.available is None else f" of {size(self.available)} available"
        together = "all models at once"
        if len(self.groups) > 1:
            together = (
                f"not all models fit at once: {len(self.groups)} groups one after the other, "
                "subjects take turns within a group"
            )
        return (
            f"{subjects} subjects, each called once and then {repeats} times in turn: about "
            f"{duration(self.seconds)}, {size(self.bytes)}{have}; {together}"
        )


def estimate(
    recipes: Sequence[Recipe],
    batches: Sequence[int],
    repeats: int,
    device: torch.device,
    anchor: Recipe | None = None,
    available: int | None = None,
    of: Callable[[Subject, Machine], Need] = need,
) -> Estimate:
    """Time and memory of a run, and its groups.

    Args:
        recipes: what is measured, in order.
        batches, repeats: timed calls of each are repeats per batch, and one more.
        device: where.
        anchor: a subject that is built in every group, so that all ratios to it are of calls that
            took turns with it; None where there is none.
        available: bytes; None asks the machine.

    Raises:
        ValueError: one family of subjects alone does not fit into memory.
    """
    machine = Machine(device)
    available = backends.available_memory(device) if available is None else available
    needs = {recipe.key: of(recipe.sketch, machine) for recipe in recipes}
    families: dict[str, list[Recipe]] = {}
    for recipe in recipes:
        families.setdefault(recipe.family, []).append(recipe)
    held = 0
    if anchor is not None:
        needs.setdefault(anchor.key, of(anchor.sketch, machine))
        held = needs[anchor.key].resident + needs[anchor.key].shared
    groups: list[list[Recipe]] = [[]]
    largest, used = 0, 0
    extra = RUNTIME + max(batches) * ACTIVATIONS
    room = None if available is None else round(available * SPARE) - extra
    for family, members in families.items():
        own = _bytes(members, needs)
        with_anchor = own if anchor is None or anchor in members else own + held
        if room is not None and with_anchor > room:
            raise ValueError(
                f"{family} needs {size(with_anchor + extra)} of memory, {size(available)} are "
                "available: choose fewer or smaller --subjects, or close other programs"
            )
        together = [*groups[-1], *members]
        wanted = _bytes(together if anchor in together or anchor is None else [*together, anchor],
                        needs)  # fmt: skip
        if groups[-1] and room is not None and wanted > room:
            groups.append([])
            together, wanted = list(members), with_anchor
        groups[-1] = together
        used = wanted
        largest = max(largest, used)
    if anchor is not None:
        groups = [group if anchor in group else [anchor, *group] for group in groups]
    seconds = 0.0
    for group in groups:
        for recipe in group:
            one = needs[recipe.key]
            seconds += sum((repeats + 1) * one.at(batch) for batch in batches)
            seconds += (one.resident + one.shared) / 0.4e9  # random numbers, packing
    return Estimate(groups, seconds, largest + extra, available)


def _bytes(recipes: Sequence[Recipe], needs: dict[str, Need]) -> int:
    """What these hold together, with the largest copy that exists while one of them runs."""
    shared = {recipe.family: needs[recipe.key].shared for recipe in recipes}
    # Plans of one form share what it made of the weights.
    own = {
        (recipe.family, recipe.sketch.form, recipe.sketch.dtype): needs[recipe.key].resident
        for recipe in recipes
    }
    passing = max(needs[recipe.key].passing for recipe in recipes)
    return sum(shared.values()) + sum(own.values()) + passing
