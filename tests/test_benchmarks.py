"""The benchmarks compute what they say they time; nothing is timed here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tolerances import assert_close_to_reference

from benchmarks import rows
from benchmarks.cases import CASES, PRESETS, STEPS
from fastfar import FARConfig

ROOT = Path(__file__).resolve().parents[1]
DEMO = FARConfig.preset("demo")


@pytest.mark.parametrize("name", CASES)
def test_every_case_equals_its_reference(name: str) -> None:
    case = CASES[name]
    args, kwargs = case.inputs(DEMO, 2, torch.float32)
    assert_close_to_reference(
        case.op,
        case.reference,
        *args,
        dtype=torch.float32,
        gradients=False,
        layers=4 * STEPS,
        **kwargs,
    )
    out = case.op(*args, **kwargs)
    assert out.isfinite().all()
    assert case.bytes_moved((args, kwargs), out) > out.numel() * 4
    again, _ = case.inputs(DEMO, 2, torch.float32)
    assert torch.equal(case.op(*again, **kwargs), out), "the same seed gives the same inputs"


def test_flops_of_the_head_are_the_known_ones() -> None:
    """FAR-B, batch 1 with guidance, T = 100, ten steps: 34.4 TFLOP without the conditions."""
    case, config = CASES["denoise_loop"], FARConfig.preset("far_base")
    executed = case.executed_flops(config, 1) / STEPS * 100 * 10
    assert executed == pytest.approx(34.4e12, rel=0.02)
    assert case.flops(config, 1) > case.executed_flops(config, 1)


@pytest.mark.parametrize("preset", PRESETS)
def test_flops_of_the_backbone_are_the_known_ones(preset: str) -> None:
    """One block: 24 S D^2 + 4 S^2 D per image."""
    config = FARConfig.preset(preset)
    length = config.buffer_size + config.num_tokens
    block = sum(
        CASES[name].flops(config, 1)
        for name in ("layernorm_attention_residual", "layernorm_mlp_residual")
    )
    assert block == 2 * (24 * length * config.width**2 + 4 * length**2 * config.width)


def test_rows(tmp_path: Path) -> None:
    path = tmp_path / "results" / "x.jsonl"
    for _ in range(2):
        rows.append(path, [rows.environment() | rows.quantiles([3.0, 1.0, 2.0])])
    first, second = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    assert first["median_s"] == second["median_s"] == 2.0 and first["repeats"] == 3
    assert first["p10_s"] == pytest.approx(1.2) and first["p90_s"] == pytest.approx(2.8)
    assert first["torch"] == torch.__version__ and first["isa"] and first["commit"]
    assert rows.quantiles([5.0])["p90_s"] == 5.0


def test_sampling_benchmark_runs() -> None:
    """One image, two diffusion steps, random weights: the gate is green and a ratio is printed."""
    options = ["--preset", "demo", "--batch", "1", "--repeats", "1", "--diffusion-steps", "2"]
    done = subprocess.run(
        [sys.executable, "benchmarks/bench_sampling.py", "--threads", "1", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "10 outer steps, 20 head calls" in done.stdout
    assert "reference float32" in done.stdout and "torch float32" in done.stdout
    assert done.stdout.count(" x\n") >= 2 and "red" not in done.stdout, done.stdout
