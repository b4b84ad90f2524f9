"""Benchmark rows: each line of a JSONL file says on its own what was measured, and on what.

A row is one subject at one batch size and shape. It holds every sample, the peak of the machine
around each of them, the correctness gate, what was executed, and the state of machine and
repository; a reader needs nothing else. Files are only ever appended to.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastfar import _native, backend
from fastfar._version import __version__

SCHEMA = 1
MODES = ("parity", "exact", "approximate", "as published")
GATES = ("green", "red", "none")  # none: nothing to compare with, so no ratio either


@dataclass(frozen=True, kw_only=True)
class Row:
    """One subject, measured at one batch size and shape. Times are seconds of one call.

    Attributes:
        op: "image" for a whole image from label to pixels, else the name of the op.
        subject: key of what was measured, unique within a run at one batch size and shape, e.g.
            "far_huge/native/bfloat16/paper" or "denoise_loop/native/bfloat16".
        title: for tables, e.g. "FAR-H native, T = 40..100".
        model: preset or name of the baseline, e.g. "far_huge", "var_d24"; "" where none is meant.
        form: how it is computed: "reference", "autocast" (FAR as published), "torch", "compile",
            "native", "eager", "triton"; of a baseline "published" or "well_run".
        mode: honesty mode, one of `MODES`.
        dtype: of the products, "bfloat16".
        batch: images (ops: of the inputs' leading dimension).
        shape: of the inputs in words.
        ways: one sentence on how this form runs.
        plan: FAR's sampling plan as plain data; of a baseline what stands for one.
        plan_name: "official", "paper", "T = 8", ...; plan_mode: "published" or what was changed.
        steps: outer autoregressive steps.
        num_parameters: of transformer and head, without the tokenizer.
        random_weights: True where weights were drawn, not loaded.
        extrapolation: what was really timed where a sample is not one whole run; None: whole runs.

        cold_s: first call in a fresh state, to pixels: compilation, packing, capture included.
        samples_s: every sample, to pixels, one per round (ops: mean of as many calls as fill it).
        tokens_samples_s, decode_samples_s: its two parts, stage one and decoding to pixels.
        median_s, p5_s, p10_s, p90_s, p95_s: of samples_s. p50 is the median.
        images_per_s: batch / median; None for an op.
        peak_flops_per_s: what the machine gave around each sample (`timing.around`), in `dtype`.
        peak_kind: of which products: "registers" or "torch.matmul" (`peak.kind`).
        reference_flops: published arithmetic of one call; executed_flops: what this form multiplies
            (None: not known).
        share_of_peak: median over the samples of executed FLOP/s over the peak.
        bytes: moved by one call, inputs, weights and outputs once; None: not counted.
        bandwidth: bytes/s that this machine streamed in the same run; None: not measured.

        error, error_limit: relative error of the gate and what is allowed; gate: one of `GATES`.
        gate_note: what was compared with what.
        stages_s: seconds of each stage, from a run of its own; empty: not taken.
        peak_memory_bytes: highest use, of the process on a CPU, of the allocator on a GPU.
        memory_note: how that was measured; "" where it was not.
        quality: figures of merit, e.g. {"frechet": 12.3}, for plots against latency.
        note: what the reader must know besides.

        run: id of the run that the row belongs to; round_grain: "subject" where all subjects took
            turns, "group" where models were built and dropped in between (see `run`).
        environment: `environment()`: time, commit, dirty, versions, CPU or GPU, threads, command.
        extra: anything else that only one kind of row has.
    """

    op: str
    subject: str
    title: str
    form: str
    mode: str
    dtype: str
    batch: int
    shape: str
    samples_s: tuple[float, ...]
    run: str
    environment: Mapping[str, Any]
    model: str = ""
    ways: str = ""
    plan: Mapping[str, Any] | None = None
    plan_name: str = ""
    plan_mode: str = ""
    steps: int | None = None
    num_parameters: int | None = None
    random_weights: bool = False
    extrapolation: str | None = None
    cold_s: float | None = None
    tokens_samples_s: tuple[float, ...] = ()
    decode_samples_s: tuple[float, ...] = ()
    peak_flops_per_s: tuple[float, ...] = ()
    peak_kind: str = ""
    reference_flops: int | None = None
    executed_flops: int | None = None
    bytes: int | None = None
    bandwidth: float | None = None
    error: float | None = None
    error_limit: float | None = None
    gate_note: str = ""
    stages_s: Mapping[str, float] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    memory_note: str = ""
    quality: Mapping[str, float] | None = None
    note: str = ""
    round_grain: str = "subject"
    extra: Mapping[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {self.mode!r}")

    @property
    def gate(self) -> str:
        """One of `GATES`; red for an error that is not a number."""
        if self.error is None or self.error_limit is None:
            return "none"
        right = math.isfinite(self.error) and self.error <= self.error_limit
        return "green" if right else "red"

    @property
    def median_s(self) -> float | None:
        """Seconds to pixels; None where nothing was timed (a row of memory alone)."""
        return statistics.median(self.samples_s) if self.samples_s else None

    @property
    def images_per_s(self) -> float | None:
        """Throughput of a row of images."""
        if self.op != "image" or not self.median_s:
            return None
        return self.batch / self.median_s

    @property
    def share_of_peak(self) -> float | None:
        """Median over the samples of executed FLOP/s over peak; None where nothing was counted."""
        flops = self.executed_flops
        pairs = zip(self.samples_s, self.peak_flops_per_s, strict=False)
        shares = [flops / seconds / peak for seconds, peak in pairs if flops]
        return statistics.median(shares) if shares else None

    @property
    def device(self) -> str:
        """Name of the GPU, else of the CPU with its instruction set."""
        gpu = self.environment.get("gpu")
        if gpu:
            return str(gpu["name"])
        return f"{self.environment.get('cpu')} ({self.environment.get('native_isa') or 'torch'})"

    @property
    def key(self) -> tuple[Any, ...]:
        """What it is a measurement of: equal keys of two runs may be compared."""
        return (self.op, self.subject, self.batch, self.shape)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the fields, and the figures that follow from them."""
        values = dataclasses.asdict(self)
        figures = quantiles(self.samples_s) if self.samples_s else {}
        return values | figures | {
            "gate": self.gate,
            "images_per_s": self.images_per_s,
            "share_of_peak": self.share_of_peak,
            "device": self.device,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Row:
        """Inverse of `to_dict`; ValueError where a field is missing or the schema is another."""
        if values.get("schema") != SCHEMA:
            raise ValueError(
                f"a row of schema {values.get('schema')!r}, this version reads {SCHEMA}: "
                "measure again, or read it with the commit that the row names"
            )
        names = {each.name for each in dataclasses.fields(cls)}
        given = {name: value for name, value in values.items() if name in names}
        required = {
            each.name
            for each in dataclasses.fields(cls)
            if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
        }
        if missing := sorted(required - given.keys()):
            raise ValueError(f"a row without {missing}")
        for name in ("samples_s", "tokens_samples_s", "decode_samples_s", "peak_flops_per_s"):
            given[name] = tuple(given.get(name) or ())
        return cls(**given)


# --- files -----------------------------------------------------------------------------------


def append(path: str | Path, found: Iterable[Row | Mapping[str, Any]]) -> None:
    """Add lines to a JSONL file in one write and flush it to the disk; nothing in it changes.

    A file whose last line was cut off by a crash is given a line end first, so that the new row
    stands on a line of its own.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row.to_dict() if isinstance(row, Row) else dict(row) for row in found]
    text = "".join(json.dumps(line, allow_nan=True) + "\n" for line in lines)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    with open(handle, "ab+", buffering=0) as file:
        if file.seek(0, os.SEEK_END) > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                text = "\n" + text
        file.write(text.encode())
        os.fsync(file.fileno())


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """Objects of a JSONL file; a line that was cut off by a crash is left out.

    Raises:
        ValueError: a line in the middle is no JSON object.
        OSError: the file cannot be read.
    """
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            if number < len(lines) and not line.endswith("}"):
                continue  # cut off, then appended to
            if number == len(lines):
                continue
            raise ValueError(f"{path}, line {number}: {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"{path}, line {number}: not a JSON object")
        found.append(value)
    return found


def read(path: str | Path) -> list[Row]:
    """Rows of this schema in a JSONL file, in order; lines of older schemas are left out.

    Raises:
        ValueError: a line is no row, or there is no row of this schema in a file that is not empty.
        OSError: the file cannot be read.
    """
    lines = read_lines(path)
    found = [Row.from_dict(line) for line in lines if line.get("schema") == SCHEMA]
    if lines and not found:
        raise ValueError(f"{path} has no row of schema {SCHEMA}: measure again with --save")
    return found


# --- what stands in every row ----------------------------------------------------------------


def commit() -> tuple[str, bool]:
    """The commit of the working tree, and whether files differ from it; ("unknown", False)."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        folder = Path(__file__).parent
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD"), bool(git("diff", "HEAD"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown", False


def cpu_name() -> str:
    """What the system calls the processor."""
    name = backend.cpu_description().get("model name")
    return name or platform.processor() or platform.machine()


def native_isa() -> str | None:
    """The instruction set that the native library runs on; None without a library."""
    return None if _native.reason() is not None else backend.native_library().selected


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """All that a row has to say beside its figures."""
    name, dirty = commit()
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": name,
        "dirty": dirty,
        "fastfar": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "native_isa": native_isa(),
        "threads": torch.get_num_threads(),
        "gpu": backend.gpu_description(device),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def quantiles(seconds: Sequence[float]) -> dict[str, Any]:
    """Median and percentiles of repeated times, with their number."""
    ranked = sorted(seconds)
    cuts = ranked * 19 if len(ranked) == 1 else statistics.quantiles(
        ranked, n=20, method="inclusive"
    )
    return {
        "median_s": statistics.median(ranked),
        "p5_s": cuts[0],
        "p10_s": cuts[1],
        "p90_s": cuts[17],
        "p95_s": cuts[18],
        "repeats": len(ranked),
    }
