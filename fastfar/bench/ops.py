"""`fastfar bench ops`: every op of the model by every path, gated against the float64 reference.

    reference   the published arithmetic in the dtype
    autocast    the same, float32 weights under autocast; their casts are part of every call
    torch       the op's implementation on PyTorch
    compile     the same by torch.compile; of `denoise_loop` its hoisted step (`compiled_head`)
    native      C++ (CPU)
    triton      Triton (GPU)

Native weights are packed, and a head is folded, before the clock starts: as at load.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fastfar import backend as backends
from fastfar.bench import peak, timing
from fastfar.bench.cases import CASES, STEPS, Case, as_float
from fastfar.bench.compiled_head import compiled_denoise_loop
from fastfar.bench.rows import Row, environment
from fastfar.bench.tables import Table, rate, share
from fastfar.bench.timing import FAILURES, Contender, Timer, relative
from fastfar.config import FARConfig

PEAK = "peak"  # the yardstick itself, as an op
PATHS = ("reference", "autocast", "torch", "compile", "native", "triton")
DEFAULT_PATHS = {"cpu": ("torch", "native"), "cuda": ("torch", "triton")}
DTYPES = (torch.bfloat16, torch.float32)
HALF = (torch.bfloat16, torch.float16)
FACTOR = 2.0
FLOORS = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1.25e-4}
LOOPED = {"denoise_loop": 4 * STEPS, "transformer_block": 4}  # layers in series raise the floor
HEADS = {64: 12, 80: 16}  # width of a head -> heads: FAR-B and FAR-H

Device = torch.device | str
TimerMaker = Callable[[Callable[[], Any], Device], Timer]


@dataclass(frozen=True)
class Problem:
    """A case at a size. shape: the size in words."""

    case: Case
    config: FARConfig
    batch: int
    shape: str


@dataclass(frozen=True)
class Options:
    """How problems are measured.

    Attributes:
        run: id of the run, for its rows.
        device: "cpu", "cuda", ...
        paths: of `PATHS`; None: those that make sense on the device.
        dtypes: of the products.
        repeats: samples of each path.
        cold: on a GPU, with the L2 cache displaced before each call.
        progress: called after each sample.
    """

    run: str
    device: Device = "cpu"
    paths: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] = DTYPES
    repeats: int = 5
    cold: bool = False
    progress: Callable[[], object] = field(default=lambda: None)

    def __post_init__(self) -> None:
        if unknown := [path for path in self.paths or () if path not in PATHS]:
            raise ValueError(f"paths {unknown} are not known; allowed: {', '.join(PATHS)}")


def problems(
    names: Sequence[str] | None,
    sizes: dict[str, FARConfig],
    batches: Sequence[int] = (1,),
    lengths: Sequence[int] = (),
) -> list[Problem]:
    """Each case at each size and batch; attention at further lengths, too.

    Args:
        names: of ops, None: all.
        sizes: name -> configuration.
        batches: images.
        lengths: positions, for heads as FAR-B and FAR-H have them.

    Raises:
        ValueError: an unknown op.
    """
    if unknown := [name for name in names or () if name not in CASES]:
        raise ValueError(f"--ops {unknown} not known; allowed: {', '.join(sorted(CASES))}")
    found = []
    for name in names or CASES:
        for batch in batches:
            found += [Problem(CASES[name], c, batch, size) for size, c in sizes.items()]
            for width, heads in HEADS.items() if name == "attention" else ():
                for length in lengths:
                    config = dataclasses.replace(
                        FARConfig(), width=heads * width, num_heads=heads, latent_size=1,
                        buffer_size=length - 1,
                    )  # fmt: skip
                    shape = f"{length} positions, {heads} heads of {width}"
                    found.append(Problem(CASES[name], config, batch, shape))
    return found


def bench(found: Sequence[Problem], options: Options) -> Iterator[Row]:
    """Rows of the problems, one after the other: whoever writes them loses nothing but the last."""
    for problem in found:
        yield from measure(problem, options)


def measure(problem: Problem, options: Options) -> list[Row]:
    """Gate and time all paths of one problem, taking turns; rows of those that ran."""
    contenders, float32_bytes = contend(problem, options)
    take_turns([each for _, each in contenders], options)
    case, size = problem.case, (problem.config, problem.batch)
    looped = f", T={STEPS}" if case.name == "denoise_loop" else ""
    job = Job(case.name, problem.batch, problem.shape + looped, case.flops(*size), float32_bytes)
    return rows_of(job, contenders, options)


@dataclass(frozen=True)
class Job:
    """What the rows of all paths have in common: op, batch, shape, FLOPs and float32 bytes."""

    op: str
    batch: int
    shape: str
    flops: int
    float32_bytes: int
    gate_note: str = f"against the float64 reference, {FACTOR:g} times its error in this dtype"


def contend(problem: Problem, options: Options) -> tuple[list[tuple[str, Contender]], int]:
    """(path, gated contender) in every dtype, and the bytes that one call moves in float32."""
    case, config, batch, device = problem.case, problem.config, problem.batch, options.device
    arguments = case.inputs(config, batch, torch.float32)
    args, kwargs = case.prepared(arguments, "torch", torch.float32, device)
    with torch.inference_mode():
        truth = _joined(
            case.reference(*(as_float(x, torch.float64) for x in args), **kwargs)
        )
    chosen = options.paths or DEFAULT_PATHS[torch.device(device).type]
    contenders = []
    for dtype in options.dtypes:
        plain = tuple(as_float(x, dtype) for x in args)
        with torch.inference_mode():
            rounded = relative(_joined(case.reference(*plain, **kwargs)), truth)
        limit = FACTOR * rounded + LOOPED.get(case.name, 1) * FLOORS[dtype]
        for path in chosen:
            missing = path in ("native", "triton") and path not in case.op.implementations
            if missing or (path == "autocast" and dtype not in HALF):
                continue
            flops = case.executed_flops(
                config, batch, "reference" if path == "autocast" else path
            )
            short = str(dtype).removeprefix("torch.")
            contender = Contender(f"{path} {short}", dtype, None, flops)
            contenders.append((path, contender))
            try:
                contender.run = _run(case, arguments, path, dtype, device)
            except FAILURES as error:
                contender.give_up(error)
                continue
            timing.gate(contender, partial(_called, contender.run), truth, limit, device)
    return contenders, case.bytes_moved((args, kwargs), truth.float())


def take_turns(contenders: Sequence[Contender], options: Options) -> None:
    """Time them as the options say."""
    on_gpu = torch.device(options.device).type == "cuda"
    make: TimerMaker = timing.flushed if options.cold and on_gpu else timing.on_device
    with torch.inference_mode():
        timing.alternate(contenders, options.repeats, options.device, make, options.progress)


def rows_of(
    job: Job, contenders: Sequence[tuple[str, Contender]], options: Options
) -> list[Row]:
    """Rows of (path, contender); one that could not run has no samples and says why."""
    here, found = environment(options.device), []
    for path, each in contenders:
        short = str(each.dtype).removeprefix("torch.")
        row = Row(
            op=job.op,
            subject=f"{job.op}/{path}/{short}",
            title=f"{job.op} {path}",
            form=path,
            mode=_mode(path, each.dtype),
            dtype=short,
            batch=job.batch,
            shape=job.shape,
            samples_s=tuple(sample.seconds for sample in each.samples),
            peak_flops_per_s=tuple(sample.peak for sample in each.samples),
            peak_kind=peak.kind(each.dtype, options.device),
            cold_s=each.cold_s,
            reference_flops=job.flops,
            executed_flops=each.executed,
            # Weights and activations of half the width are half the traffic.
            bytes=job.float32_bytes * each.dtype.itemsize // 4,
            bandwidth=bandwidth(str(options.device), torch.get_num_threads()),
            error=each.error,
            error_limit=each.limit,
            gate_note=job.gate_note,
            note=f"not available: {each.note}" if each.note else "",
            run=options.run,
            environment=here,
            extra={"timer": "" if each.timer is None else each.timer.kind},
        )
        found.append(row)
    return found


@cache
def bandwidth(device: str, threads: int) -> float | None:
    """Bytes/s of this run; None where nothing measures it."""
    try:
        return peak.bandwidth(device, threads=threads)
    except OSError:
        return None


# --- the yardstick ---------------------------------------------------------------------------


def yardsticks(options: Options) -> Iterator[Row]:
    """What the machine gives, and how much that moves while nothing changes; see `peak`.

    Rows without samples: `extra["per_s"]` holds FLOP/s or bytes/s.
    """
    device, here = options.device, environment(options.device)
    measures: list[tuple[str, str, torch.dtype, Callable[[], float]]] = [
        (peak.kind(dtype, device), "FLOP/s", dtype, partial(peak.peak_flops, dtype, device))
        for dtype in options.dtypes
    ]
    if bandwidth(str(device), torch.get_num_threads()) is not None:
        measures += [
            (level, "B/s", torch.float32, partial(peak.bandwidth, device, level, repeats=1))
            for level in (peak.LEVELS if torch.device(device).type == "cpu" else ("memory",))
        ]
    for kind, unit, dtype, take in measures:
        take()
        short = str(dtype).removeprefix("torch.")
        yield Row(
            op=PEAK,
            subject=f"{PEAK}/{kind}/{short}",
            title=f"{kind}, {short}" if unit == "FLOP/s" else f"reading from {kind}",
            form=kind,
            mode="exact",
            dtype=short,
            batch=1,
            shape=kind,
            samples_s=(),
            run=options.run,
            environment=here,
            extra={"unit": unit, "per_s": [take() for _ in range(max(options.repeats, 2))]},
        )


def yardstick_table(rows: Sequence[Row]) -> Table:
    """Median, best and range of `yardsticks`."""
    lines = []
    for row in rows:
        found = row.extra["per_s"]
        median = statistics.median(found)
        lines.append(
            (row.title, rate(median) + row.extra["unit"], rate(max(found)) + row.extra["unit"],
             share((max(found) - min(found)) / median))
        )  # fmt: skip
    return Table("Peak", ("peak", "median", "best", "range"), tuple(lines))


# --- parts -----------------------------------------------------------------------------------


def _run(
    case: Case, arguments: Any, path: str, dtype: torch.dtype, device: Device
) -> Callable[[], Any]:
    """What a path computes. ValueError, OSError where it cannot."""
    on_gpu = torch.device(device).type == "cuda"
    if path == "native" and on_gpu:
        raise ValueError("native kernels run on a CPU")
    if path == "triton" and not on_gpu:
        raise ValueError("Triton kernels run on a GPU")
    if path in ("native", "triton") and (reason := backends.backends()[path]) is not None:
        raise OSError(reason)
    if path == "autocast":
        args, kwargs = case.prepared(arguments, "torch", torch.float32, device)
        return partial(_under_autocast, case.reference, _leaves(args), kwargs, dtype, device)
    args, kwargs = case.prepared(arguments, path, dtype, device)
    if path == "reference":
        return partial(case.reference, *args, **kwargs)
    if path == "compile" and case.name == "denoise_loop":
        return compiled_denoise_loop(*args, **kwargs)
    launch = case.op.implementations["torch" if path == "compile" else path]
    if path == "compile":
        launch = torch.compile(launch, dynamic=False)
    return partial(launch, *args, **kwargs)


def _leaves(args: Any) -> Any:
    """Matrices as parameters: within a call autocast keeps the 16-bit copies of such leaves."""

    def leaf(x: Any) -> Any:
        real = isinstance(x, Tensor) and x.is_floating_point() and x.ndim == 2
        return nn.Parameter(x) if real else x

    return tree_map(leaf, args)


def _under_autocast(
    function: Callable[..., Any], args: Any, kwargs: Any, dtype: torch.dtype, device: Device
) -> Any:
    # Parameters were made outside of inference mode, in which nothing is kept.
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(torch.device(device).type, dtype),
    ):
        return function(*args, **kwargs)


def _called(run: Callable[[], Any]) -> Tensor:
    return _joined(run())


def _joined(out: Any) -> Tensor:
    """Several results of one shape as one tensor."""
    return out if isinstance(out, Tensor) else torch.stack(tuple(out))


def _mode(path: str, dtype: torch.dtype) -> str:
    if path == "autocast":
        return "as published"
    return "exact" if dtype in HALF else "parity"
