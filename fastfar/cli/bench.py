"""`fastfar bench`: how fast it is here, beside what; or what the cost model expects of a GPU."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

# PyTorch and the models are imported by the modes: --help and a wrong argument need not wait.
_GPUS = ("h100", "h200", "h20", "a100", "b200", "rtx4090")
_PRESETS = ("demo", "far_base", "far_huge", "far_large")
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_AXES = ("threads", "batch", "steps", "tokens")
_FORMS = ("reference", "autocast", "torch", "compile", "native", "eager", "triton")
# mode -> (module of fastfar.cli, function, what it does)
_MODES = {
    "latency": ("_bench_images", "latency", "whole images, one at a time: the default"),
    "throughput": ("_bench_images", "throughput", "whole images in batches of 1, 4, 16"),
    "table3": ("_bench_images", "table3", "Table 3 of the paper on this machine"),
    "memory": ("_bench_memory", "memory", "highest memory of every subject, in its own process"),
    "ops": ("_bench_ops", "ops", "every op, each way of computing it"),
    "scaling": ("_bench_ops", "scaling", "threads, batch, diffusion steps, tokens"),
    "report": ("_bench_report", "report", "tables of rows: report FILE.jsonl"),
}

_DESCRIPTION = """\
Measure on this machine: first each subject's error against the reference (one that is wrong gets no
ratio), then all of them in turn, from a class label to pixels, the machine's peak beside every
sample. Before it starts it says how long it takes and what memory it needs.
With --predict, expect instead of measuring: FLOPs, bytes, kernels and time by the cost model, for a
GPU that need not be here."""

_EPILOG = (
    "modes:\n"
    + "\n".join(f"  {name:<11} {text}" for name, (_, _, text) in _MODES.items())
    + """

subjects: MODEL[/FORM[/PLAN]]
  FAR: demo, far_base, far_large, far_huge; forms: reference (published loop, float32), autocast
    (the same in 16 bits: as published), torch (exact algebra on PyTorch), compile (published
    networks and loop, torch.compile), native (C++), eager (Triton, one launch at a time), triton
    (Triton, a CUDA graph); plans: official, paper (T from 40 to 100), T=8; -mask behind for masks
  baselines: var_d16, var_d20, var_d24, var_d30, mar_base, mar_large, mar_huge, llamagen_b,
    llamagen_l, llamagen_xl; forms: published, well_run

examples:
  fastfar bench                                             # the embedded demo on the CPU
  fastfar bench table3 --threads 2 --save table3.jsonl      # MAR-H, LlamaGen-XL, VAR-d24, FAR-H
  fastfar bench --subjects far_huge/native/paper var_d24 --save rows.jsonl
  fastfar bench --device cuda --preset far_huge --batch 1 64 --save rows.jsonl
  fastfar bench report rows.jsonl --plots plots
  fastfar bench --compare before.jsonl after.jsonl
  fastfar bench --predict h100 --preset far_huge
"""
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of `fastfar`."""
    parser = subparsers.add_parser(
        "bench",
        help="measure, compare or predict the time of an image",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("what", metavar="MODE", nargs="*", help="see below (latency)")

    group = parser.add_argument_group("what is measured")
    add = group.add_argument
    add("--device", metavar="NAME", default="cpu", help="cpu, cuda, cuda:1 (%(default)s)")
    add("--subjects", metavar="SUBJECT", nargs="+", help="see below (demo, or --preset)")
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--preset", choices=_PRESETS, help="FAR with random weights (--predict: far_huge)"
    )
    which.add_argument("--checkpoint", metavar="CHECKPOINT", help="folder or hub name (demo)")
    add("--mode", choices=("nomask", "mask"), default="nomask", help="published plan of a preset")
    add("--diffusion-steps", metavar="T", type=int, help="of every outer step (100)")
    add("--guidance-scale", metavar="S", type=float, help="(that of the plan)")
    add("--head-depth", metavar="D", type=int, help="of a preset's head")
    add("--backends", metavar="FORM", nargs="+", choices=_FORMS, help="of --preset (all)")
    add("--dtype", choices=_DTYPES, default="auto", help="of all forms but reference (best)")
    add("--batch", metavar="N", type=int, nargs="+", help="images per run (1)")
    add("--repeats", metavar="N", type=int, help="timed calls of every subject (5; table3: 3)")
    add("--threads", metavar="N", type=int, help="of the CPU (PyTorch's number)")
    add("--timed-steps", metavar="N", type=int, help="run of MAR's 256, the rest extrapolated (8)")
    add("--quick", action="store_true", help="one timed call, few steps: is it all there?")

    group = parser.add_argument_group("ops and scaling")
    add = group.add_argument
    add("--ops", metavar="OP", nargs="+", help="which; decode_latents and peak, too (all)")
    add("--lengths", metavar="S", type=int, nargs="+", help="attention at these lengths as well")
    add("--axis", choices=_AXES, default="batch", help="of scaling (%(default)s)")
    add("--values", metavar="N", type=int, nargs="+", help="on the axis (a few that make sense)")

    group = parser.add_argument_group("files")
    add = group.add_argument
    add("--save", metavar="FILE", type=Path, help="append rows to a JSONL file, each when ready")
    add("--resume", action="store_true", help="go on with the last run of --save FILE")
    add("--trace", metavar="FILE", type=Path, help="Chrome trace of one run of the last subject")
    add("--nvtx", action="store_true", help="named ranges for an attached profiler")
    add("--json", action="store_true", help="print one JSON object")
    add("--csv", metavar="FILE", type=Path, help="report: all figures as CSV")
    add("--plots", metavar="DIR", type=Path, help="report: plots into this folder")
    add("--markdown", action="store_true", help="report: tables as Markdown")
    add("--run", metavar="ID", dest="run_id", help="report: of this run (the file's last)")
    add("--quality", metavar="FILE", type=Path, help="report: join lines of fastfar eval --output")

    group = parser.add_argument_group("instead of a plain measurement")
    add = group.add_argument
    add("--compare", metavar="FILE", type=Path, nargs=2, help="two files of rows: which is faster")
    add("--base", metavar="REV", help="measure this commit of the repository beside the files here")
    add("--margin", metavar="X", type=float, default=0.02,
        help="differences below it are none (%(default)s)")  # fmt: skip
    add("--turns", help=argparse.SUPPRESS)  # how --base speaks with its two processes
    add("--predict", metavar="GPU", choices=_GPUS, help=f"expect: {', '.join(_GPUS)}")
    add("--cold", action="store_true", help="GPU: time single kernels with an empty L2 cache")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """One mode. Returns 0, or 1 where a subject's result is wrong."""
    name, *args.files = args.what or ["latency"]
    if name not in _MODES:
        raise ValueError(f"mode {name!r} is not known; allowed: {', '.join(_MODES)}")
    if args.files and name != "report":
        raise ValueError(f"{name} takes no file, got {args.files}; rows are read by report FILE")
    _check(args, name)
    module, function, _ = _MODES[name]
    if args.predict:
        module, function = "_bench_predict", "predict"
    elif args.compare:
        module, function = "_bench_report", "compare"
    elif args.base is not None:
        module, function = "_bench_report", "base"
    elif name != "report":
        _prepare(args)
    args.bench_mode = name
    command = getattr(importlib.import_module(f"fastfar.cli.{module}"), function)
    if args.turns is not None:
        from fastfar.cli._bench_report import in_turns

        return in_turns(args, command)
    code: int = command(args)
    return code


def _check(args: argparse.Namespace, name: str) -> None:
    for option in ("repeats", "diffusion_steps", "head_depth", "threads", "timed_steps"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option.replace('_', '-')} must be at least 1, got {value}")
    if args.batch is not None and min(args.batch) < 1:
        raise ValueError(f"--batch must be at least 1, got {min(args.batch)}")
    if args.head_depth is not None and not (args.preset or args.predict):
        raise ValueError("--head-depth belongs to a --preset: a checkpoint's head is what it is")
    if args.subjects and (args.preset or args.checkpoint or args.backends):
        raise ValueError("--subjects names models and forms: leave --preset, --checkpoint and "
                         "--backends out")  # fmt: skip
    if args.resume and args.save is None:
        raise ValueError("--resume needs --save FILE: the file that the run was saved to")


def _prepare(args: argparse.Namespace) -> None:
    """Threads, and the device: ValueError, with the reason, where there is no such device."""
    import torch

    from fastfar import backend

    backend.resolve("torch", torch.device(args.device))
    if args.threads is not None:
        torch.set_num_threads(args.threads)
