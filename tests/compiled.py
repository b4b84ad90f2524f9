"""Kernels as machine code for GPUs that are not there, and what their binaries say of them.

    python tests/compiled.py                the table of all kernels
    python tests/compiled.py --update       the same, and kernels/gpu/budget.json rewritten
    python tests/compiled.py --arch sm_90 --dtype bf16 --op denoise_loop        a part of it

The functions of LAUNCHES (tests/triton/launches.py) are run on fake CUDA tensors inside
`recording()`. Each launch that they record is specialised by Triton's own code, as its run-time
would do, compiled to a cubin (or hsaco), and read with cuobjdump and nvdisasm of Triton's wheel.
Results are kept under build/compiled/, by source, compiler version and target.

The tests run with Triton's interpreter, this with its compiler: `measure` starts another process.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from budget import (
    ARCHS,
    BUDGET,
    DTYPES,
    NVIDIA,
    Row,
    budget_problems,
    hard_problems,
    read_budget,
    table,
    write_budget,
)
from machine_code import inspect

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
LAUNCHES = TESTS / "triton" / "launches.py"
CACHE = ROOT / "build" / "compiled"
PROCESSES = 2
FORMAT = 1  # of what is kept in CACHE: raise it when what is read changes


# --- from a launch to a binary (only in a process without the interpreter) -------------------


class Pointer:
    """Stands for a tensor where Triton specialises: dtype, alignment and extent.

    Allocations are aligned to 256 bytes and more, so that the offset of a view decides.
    """

    def __init__(self, dtype: Any, offset: int, size: int) -> None:
        self.dtype, self.offset, self.size = dtype, offset, size

    def data_ptr(self) -> int:
        """Address modulo the alignment of allocations."""
        return self.offset

    def ptr_range(self) -> int:
        """Bytes of the whole storage: AMD's code uses 32-bit offsets below 2 GiB."""
        return self.size


def _stand_in(argument: Any) -> Any:
    import torch

    if not isinstance(argument, torch.Tensor):
        return argument
    size = argument.untyped_storage().nbytes()
    return Pointer(argument.dtype, argument.storage_offset() * argument.element_size(), size)


def target_of(arch: str) -> Any:
    """Triton's name of an architecture."""
    from triton.backends.compiler import GPUTarget

    number = ARCHS[arch]
    return GPUTarget("hip", arch, 64) if number > 900 else GPUTarget("cuda", number, 32)


def specialise(launch: Any, target: Any) -> tuple[Any, Any]:
    """(ASTSource, options) that Triton's run-time would compile for a launch on `target`."""
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, backend = launch.kernel, make_backend(target)
    keywords = {"enable_fp_fusion": True, **launch.options}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, _ = bind(*map(_stand_in, launch.args), **keywords)
    packed = kernel._pack_args(backend, keywords, bound, specialisation, keywords)
    options, signature, constants, attributes = packed
    return ASTSource(kernel, signature, constants, attributes), options


def called(kernel: Any) -> Iterator[Any]:
    """The function and all functions under @triton.jit that it calls, directly or not."""
    waiting, seen = [kernel], set()
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        names = each.fn.__code__.co_names
        near = (each.fn.__globals__.get(name) for name in names)
        waiting.extend(x for x in near if hasattr(x, "fn") and hasattr(x, "cache_key"))


def _wanted(launch: Any, dtype: str) -> str:
    """Why the binary must hold tensor-core instructions; "" if it need not."""
    if not any(re.search(r"\btl\.dot\(", each.src) for each in called(launch.kernel)):
        return ""
    if dtype != "fp32":
        return f"tl.dot in {dtype}"
    precision = str(launch.options.get("PRECISION", ""))
    return f"tl.dot in {precision}" if "tf32" in precision else ""


@dataclass(frozen=True)
class Job:
    """A specialisation to be compiled.

    Attributes:
        key: hash of types, alignment, constants, warps and stages.
        kept: the file of the result, named after all that the result depends on.
    """

    launch: Any
    target: Any
    source: Any
    options: Any
    key: str
    kept: Path


def make_job(launch: Any, arch: str) -> Job:
    """The specialisation of a launch on one of `ARCHS`."""
    import triton
    from triton.compiler import make_backend

    target = target_of(arch)
    source, options = specialise(launch, target)
    constants = {path: str(value) for path, value in source.constants.items()}
    given = sorted(launch.options.items())
    key = _digest(source.signature, constants, source.attrs, given)[:8]
    backend = make_backend(target)
    parts = (triton.__version__, source.hash(), backend.hash(), options.hash())
    kept = CACHE / f"{_digest(FORMAT, *parts)[:32]}.json"
    return Job(launch, target, source, options, key, kept)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _compile(number: int) -> dict[str, Any]:
    """Compile and inspect one of `_jobs`; {"error": why} if the compiler refuses it."""
    import triton

    job = _jobs[number]
    with tempfile.TemporaryDirectory() as name:
        triton.knobs.cache.dir = name
        try:
            compiled = triton.compile(job.source, job.target, job.options.__dict__)
        except Exception as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            return {"error": f"does not compile: {' '.join(lines[-3:])[:600]}"}
        resources = inspect(compiled, Path(name))
    return {
        **resources,
        "threads": compiled.metadata.num_warps * job.target.warp_size,
        "shared": compiled.metadata.shared,
        "columns": getattr(compiled.metadata, "tmem_size", None) or 0,
    }


_jobs: list[Job] = []  # inherited by the workers, which are forked: kernels cannot be sent


def _compile_missing(jobs: Iterable[Job]) -> dict[Path, dict[str, Any]]:
    """Results by the file that keeps them; what fails is not kept."""
    global _jobs
    _jobs = list({job.kept: job for job in jobs if not job.kept.is_file()}.values())
    fork = multiprocessing.get_context("fork")
    failed: dict[Path, dict[str, Any]] = {}
    with ProcessPoolExecutor(PROCESSES, mp_context=fork) as pool:
        waiting = {pool.submit(_compile, i): job for i, job in enumerate(_jobs)}
        for future in as_completed(waiting):
            kept = waiting[future].kept
            try:
                found = future.result()
            except Exception as error:  # also where the compiler took its process down
                found = {"error": f"{type(error).__name__}: {error}"}
            if "error" in found:
                failed[kept] = found
                continue
            beside = kept.with_suffix(f".{os.getpid()}.tmp")
            beside.write_text(json.dumps(found), encoding="utf-8")
            os.replace(beside, kept)
    return failed


def _constants(launch: Any) -> str:
    """Readable constants in the kernel's order, warps and stages last."""
    options = dict(launch.options)
    tail = {name: options.pop(name, "-") for name in ("num_warps", "num_stages")}
    named = zip(launch.kernel.arg_names, launch.args, strict=False)
    absent = [name for name, x in named if x is None]
    words = [f"{name}={value}" for name, value in options.items()]
    words += [f"no {', '.join(absent)}"] if absent else []
    return " ".join([*words, f"warps={tail['num_warps']}", f"stages={tail['num_stages']}"])


def load_launches(path: Path) -> dict[str, Any]:
    """LAUNCHES of a file; by path, since its folder's name is that of a package."""
    spec = importlib.util.spec_from_file_location(f"launches_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return dict(module.LAUNCHES)


def record(function: Any, arch: str, dtype: str) -> list[Any]:
    """What an entry of LAUNCHES launches."""
    import torch
    from fake_cuda import fake_cuda

    from fastfar.kernels.gpu._launch import recording

    with fake_cuda(), recording() as seen:
        function(ARCHS[arch], getattr(torch, DTYPES[dtype]))
    return seen


def compile_all(
    source: Path, ops: Sequence[str], grid: Sequence[tuple[str, str]]
) -> Iterator[Row | str]:
    """Rows of all launches of the entries `ops` on each (arch, dtype); messages of failures."""
    import torch

    torch.set_num_threads(1)
    CACHE.mkdir(parents=True, exist_ok=True)
    entries = load_launches(source)
    if unknown := set(ops) - set(entries):
        raise SystemExit(f"no such entries: {sorted(unknown)}; there are {sorted(entries)}")
    jobs: list[tuple[str, str, str, Job]] = []
    for op in ops or entries:
        for arch, dtype in grid:
            try:
                recorded = record(entries[op], arch, dtype)
            except Exception as error:  # an entry of somebody else's: told, not fatal here
                yield f"{op} {dtype} {arch}: cannot be recorded: {type(error).__name__}: {error}"
                continue
            jobs += [(op, dtype, arch, make_job(launch, arch)) for launch in recorded]
    failed = _compile_missing(job for *_, job in jobs)
    seen: dict[tuple[str, ...], set[str]] = {}
    for op, dtype, arch, job in jobs:
        keys = seen.setdefault((op, job.launch.name, dtype, arch), set())
        if job.key in keys:
            continue
        keys.add(job.key)
        name, constants = job.launch.name, _constants(job.launch)
        if job.kept in failed:
            yield f"{op}: {name} ({constants}) {dtype} {arch}: {failed[job.kept]['error']}"
        else:
            found = json.loads(job.kept.read_text(encoding="utf-8"))
            labels = (op, name, len(keys), dtype, arch, job.key, constants)
            yield Row(*labels, wanted=_wanted(job.launch, dtype), **found)


# --- for tests, and the command --------------------------------------------------------------


def unusable() -> str | None:
    """Why nothing can be compiled here; None if it can."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:  # without origin: a folder of that name
        return "Triton is not installed"
    from triton.runtime.jit import JITFunction

    if not hasattr(JITFunction, "_pack_args"):
        import triton

        return f"needs Triton 3.5 or newer, this is {triton.__version__}"
    return None


@dataclass(frozen=True)
class Measured:
    """Rows of what compiled, messages of what did not, and the version of Triton."""

    rows: list[Row]
    failures: list[str]
    triton: str


def measure(
    grid: Sequence[tuple[str, str]], ops: Sequence[str] = (), source: Path = LAUNCHES
) -> Measured:
    """Compile the entries `ops` (all) on a grid of (arch, dtype), in a process of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "--source", str(source), "--json", str(out)]
        command += ["--grid", ",".join(f"{arch}:{dtype}" for arch, dtype in grid)]
        command += [word for op in ops for word in ("--op", op)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if not out.is_file():
            raise RuntimeError(done.stdout + done.stderr)
        data = json.loads(out.read_text(encoding="utf-8"))
    return Measured([Row(**row) for row in data["rows"]], data["failures"], data["triton"])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 if something does not compile or is beyond a limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", choices=ARCHS, help="(all)")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="(all)")
    parser.add_argument("--op", action="append", default=[], help="entry of LAUNCHES (all)")
    parser.add_argument("--grid", help="ARCH:DTYPE,... instead of --arch and --dtype")
    parser.add_argument("--source", type=Path, default=LAUNCHES, help="the file with LAUNCHES")
    parser.add_argument("--json", type=Path, help="write rows and failures there, print nothing")
    parser.add_argument("--update", action="store_true", help="rewrite the budget")
    args = parser.parse_args(arguments)
    if args.update and args.op:
        parser.error("--update takes all entries: leave --op out")
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path.insert(0, str(ROOT))  # fastfar, where it is not installed
    import triton

    grid = [(arch, dtype) for arch in args.arch or ARCHS for dtype in args.dtype or DTYPES]
    if args.grid:
        grid = [tuple(word.split(":")) for word in args.grid.split(",")]
    found = list(compile_all(args.source, args.op, grid))
    rows = [row for row in found if isinstance(row, Row)]
    failures = [message for message in found if isinstance(message, str)]
    if args.json:
        data = {"rows": [asdict(row) for row in rows], "failures": failures}
        args.json.write_text(json.dumps({**data, "triton": triton.__version__}), encoding="utf-8")
        return 0
    print(table(rows))
    held = [row for row in rows if row.arch in NVIDIA]
    budget = read_budget()
    problems = failures + [problem for row in held for problem in hard_problems(row)]
    if args.update:
        kept = [row for row in budget.rows if (row.arch, row.dtype) not in grid]
        write_budget([*kept, *held], triton.__version__)
        print(f"\nwritten: {BUDGET}")
    elif budget.triton == triton.__version__:
        problems += budget_problems(held, budget)
    else:
        print(f"\nTriton {triton.__version__}: the budget was made with {budget.triton}, not held")
    print("\n".join(["", *problems, f"{len(rows)} specialisations, {len(problems)} problems"]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
