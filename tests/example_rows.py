"""Made-up rows of benchmarks, for tests of what reads them."""

from __future__ import annotations

import random
from typing import Any

from fastfar.bench.rows import Row

ENVIRONMENT = {
    "time": "2026-11-22T10:00:00+00:00",
    "commit": "0123456789ab",
    "dirty": False,
    "fastfar": "0.1.0",
    "torch": "2.13.0",
    "python": "3.11.7",
    "system": "Linux x86_64",
    "cpu": "Example CPU",
    "isa": "AVX512",
    "native_isa": "amx",
    "threads": 2,
    "gpu": None,
    "command": "fastfar bench table3 --save rows.jsonl",
}
PEAK = 4e12


def noisy(
    seconds: float, repeats: int = 5, noise: float = 0.03, seed: int = 0
) -> tuple[float, ...]:
    """Samples that scatter log-normally around `seconds`."""
    draw = random.Random(f"{seed} {seconds}")
    return tuple(seconds * draw.lognormvariate(0, noise) for _ in range(repeats))


def row(
    subject: str = "far_huge/native/bfloat16/paper", seconds: float = 3.0, **changes: Any
) -> Row:
    """One image; the samples scatter by 3 %, around them the machine gives 4 TFLOP/s."""
    model, form = subject.split("/")[:2]
    samples = changes.pop("samples_s", noisy(seconds))
    values: dict[str, Any] = {
        "op": "image",
        "subject": subject,
        "title": subject,
        "model": model,
        "form": form,
        "mode": "exact",
        "dtype": "bfloat16",
        "batch": 1,
        "shape": "256 tokens of 16",
        "samples_s": samples,
        "peak_flops_per_s": (PEAK,) * len(samples),
        "peak_kind": "registers",
        "run": "run-1",
        "environment": ENVIRONMENT,
        "random_weights": True,
        "error": 0.01,
        "error_limit": 0.02,
    }
    return Row(**(values | changes))


def table3() -> list[Row]:
    """The paper's table on a made-up machine: each baseline in both forms, FAR-H in three."""
    published: dict[str, Any] = {"mode": "as published"}
    far: dict[str, Any] = {"steps": 10, "num_parameters": 811_700_000,
                           "reference_flops": int(23.4e12)}  # fmt: skip
    mar = {"steps": 256, "num_parameters": 942_900_000, "reference_flops": int(290e12),
           "executed_flops": int(290e12),
           "extrapolation": "8 of 256 steps, each standing for 32"}  # fmt: skip
    llamagen = {"steps": 256, "num_parameters": 775_000_000, "reference_flops": int(0.8e12),
                "executed_flops": int(0.8e12)}  # fmt: skip
    var = {"steps": 10, "num_parameters": 1_033_000_000, "reference_flops": int(2.8e12),
           "executed_flops": int(2.8e12)}  # fmt: skip
    far_stages = {"transformer": 0.8, "head": 1.6, "decode": 0.62}
    return [
        row("mar_huge/published/bfloat16", 172.0, title="MAR-H as published",
            stages_s={"transformer": 128.0, "head": 40.0, "decode": 1.1}, **published, **mar),
        row("mar_huge/well_run/bfloat16", 96.0, title="MAR-H well run",
            stages_s={"transformer": 70.0, "head": 24.0, "decode": 0.8}, **mar),
        row("llamagen_xl/published/bfloat16", 61.0, title="LlamaGen-XL as published",
            stages_s={"transformer": 58.5, "decode": 1.2}, **published, **llamagen),
        row("llamagen_xl/well_run/bfloat16", 31.0, title="LlamaGen-XL well run",
            stages_s={"transformer": 30.0, "decode": 0.7}, **llamagen),
        row("var_d24/published/bfloat16", 9.4, title="VAR-d24 as published",
            stages_s={"transformer": 8.1, "decode": 1.2}, **published, **var),
        row("var_d24/well_run/bfloat16", 2.9, title="VAR-d24 well run",
            stages_s={"transformer": 2.2, "decode": 0.7}, **var),
        row("far_huge/autocast/bfloat16/official", 40.1, title="FAR-H as published",
            plan_name="official", stages_s={"transformer": 5.0, "head": 34.0, "decode": 1.1},
            **published, **far),
        row("far_huge/native/bfloat16/official", 3.71, title="FAR-H native, T = 100",
            plan_name="official", stages_s={"transformer": 0.8, "head": 2.3, "decode": 0.62},
            executed_flops=int(11e12), **far),
        row("far_huge/native/bfloat16/paper", 3.05, title="FAR-H native, T = 40..100",
            plan_name="paper", stages_s=far_stages, executed_flops=int(8e12),
            ways="C++ kernels, bfloat16 weights packed at load", cold_s=4.4,
            tokens_samples_s=noisy(2.4), decode_samples_s=noisy(0.62),
            peak_memory_bytes=3 << 30, memory_note="resident set of a child process", **far),
    ]  # fmt: skip


def ops() -> list[Row]:
    """Some ops, native and PyTorch, with bytes and bandwidth."""
    figures = {  # name: FLOP, bytes, seconds native, seconds torch
        "denoise_loop": (28e9, 40e6, 0.017, 0.045),
        "layernorm_mlp_residual": (16.8e9, 29e6, 0.012, 0.016),
        "layernorm_attention_residual": (9.4e9, 16e6, 0.009, 0.011),
        "attention": (1.0e9, 6.6e6, 0.0013, 0.0017),
        "adaln_mlp_block": (2.1e9, 14e6, 0.0011, 0.003),
        "linear": (4.2e9, 9e6, 0.0021, 0.0025),
        "filter_mask_patchify": (4.2e6, 0.06e6, 2.3e-5, 7e-5),
        "groupnorm_silu": (17e6, 33e6, 0.0021, 0.004),
    }
    found = []
    for name, (flops, moved, native, torch) in figures.items():
        for form, seconds in (("native", native), ("torch", torch)):
            found.append(
                row(f"{name}/{form}/bfloat16", seconds, op=name, model="", form=form,
                    title=f"{name} {form}", shape="FAR-H, batch 1", executed_flops=int(flops),
                    bytes=int(moved), bandwidth=22e9)
            )  # fmt: skip
    return found
