"""The cases of the benchmarks compute and cost what they say; nothing is timed here."""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import tiny_recipe
from tolerances import assert_close_to_reference, joined

from fastfar import KLVAE, FARConfig, SamplingPlan, _native
from fastfar.bench import rows
from fastfar.bench.cases import CASES, PRESETS, STEPS
from fastfar.costs import counts
from fastfar.ops._convolution import can_pack, is_packed
from fastfar.ops._folded_head import FoldedHead
from fastfar.ops._head import PackedHead
from fastfar.packing import PackedWeight
from fastfar.training.meter import PARTS

ROOT = Path(__file__).resolve().parents[1]
DEMO = FARConfig.preset("demo")


@pytest.mark.parametrize("name", CASES)
def test_every_case_equals_its_reference(name: str) -> None:
    case = CASES[name]
    batch = 1 if "convolution" in name else 2  # they are KL-16's, and slow in float64
    args, kwargs = case.inputs(DEMO, batch, torch.float32)
    assert_close_to_reference(
        case.op,
        case.reference,
        *args,
        dtype=torch.float32,
        gradients=False,
        layers=4 * STEPS,
        **kwargs,
    )
    out = joined(case.op(*args, **kwargs))
    assert out.isfinite().all()
    assert case.bytes_moved((args, kwargs), out) > out.numel() * 4
    again, _ = case.inputs(DEMO, batch, torch.float32)
    repeated = joined(case.op(*again, **kwargs))
    assert torch.equal(repeated, out), "the same seed gives the same inputs"


def test_weights_are_prepared_as_at_load() -> None:
    def prepared(name: str, backend: str) -> tuple[Any, ...]:
        arguments = CASES[name].inputs(DEMO, 1, torch.float32)
        return CASES[name].prepared(arguments, backend, torch.bfloat16, "cpu")[0]

    assert all(x.dtype is torch.bfloat16 for x in prepared("linear", "torch"))
    head, *rest = prepared("denoise_loop", "triton")
    assert isinstance(head, FoldedHead) and rest[-1].dtype is torch.float32
    if (missing := _native.reason()) is not None:
        pytest.skip(f"native library: {missing}")
    x_NK, weight, bias = prepared("linear", "native")
    assert isinstance(weight, PackedWeight) and x_NK.dtype is bias.dtype is torch.float32
    assert isinstance(prepared("denoise_loop", "native")[0], PackedHead)
    assert prepared("attention", "native")[0].dtype is torch.bfloat16, "it has no weights"
    if can_pack(torch.bfloat16):
        assert is_packed(prepared("convolution_residual", "native")[1])


def test_flops_of_the_head_are_the_known_ones() -> None:
    """FAR-B, batch 1 with guidance, T = 100, ten steps: 34.4 TFLOP."""
    case, config = CASES["denoise_loop"], FARConfig.preset("far_base")
    assert case.flops(config, 1) / STEPS * 100 * 10 == pytest.approx(34.4e12, rel=0.01)
    executed = [case.executed_flops(config, 1, path) for path in ("native", "torch", "reference")]
    assert executed == sorted(executed), "the published code does the most"
    assert executed[0] < case.flops(config, 1) < executed[2]


@pytest.mark.parametrize("preset", PRESETS)
def test_flops_of_the_backbone_are_the_known_ones(preset: str) -> None:
    """One block: 24 S D^2 + 4 S^2 D per image."""
    config = FARConfig.preset(preset)
    length = config.buffer_size + config.num_tokens
    known = 2 * (24 * length * config.width**2 + 4 * length**2 * config.width)
    halves = ("layernorm_attention_residual", "layernorm_mlp_residual")
    assert sum(CASES[name].flops(config, 1) for name in halves) == known
    assert CASES["transformer_block"].flops(config, 1) == known


def test_counts_of_an_image_are_the_known_ones() -> None:
    """Guided, T = 100: backbone 2.33 and 10.5 TFLOP, head 34.4 and 18.3, decoder 0.25."""
    plan = SamplingPlan.official()
    with torch.device("meta"):
        vae = KLVAE()
    for preset, backbone, head in (("far_base", 2.33, 34.4), ("far_huge", 10.5, 18.3)):
        config = FARConfig.preset(preset)
        published = counts.reference_image_flops(config, plan, vae) / 1e12
        assert published == pytest.approx(backbone + head + 0.25, rel=0.01)
        work = counts.native_work(config, plan, vae)
        assert work["decode"].flops == pytest.approx(0.25e12, rel=0.01)
        # The first outer step has no unconditional half; the final shift is folded.
        assert work["transformer"].flops == pytest.approx(0.95 * backbone * 1e12, rel=0.01)
        folded = (5 * config.head_depth + 1) / (5 * config.head_depth + 2)
        assert work["head"].flops == pytest.approx(0.95 * folded * head * 1e12, rel=0.03)
        assert work["decode"].bound(1e12, 1e15) == pytest.approx(0.25, rel=0.01)
        assert work["decode"].bound(1e18, work["decode"].bytes) == 1.0


def test_executed_flops_fall_from_published_to_native() -> None:
    head = counts.Head.of(FARConfig.preset("far_huge"), 256, 2, 100)
    ranked = [head.native_flops(), head.hoisted_flops(), head.published_flops()]
    assert ranked == sorted(ranked)
    assert head.native_flops() < head.reference_flops() < head.published_flops()


def test_the_pytest_benchmark_suites_run() -> None:
    """One op with its gate; nothing is timed. All suites are imported and collected."""
    if importlib.util.find_spec("pytest_benchmark") is None:
        pytest.skip("pytest-benchmark is not installed (extra bench)")
    chosen = "add_noise-demo-float32 and not compile"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "-p", "no:cacheprovider", "-k", chosen,
         "--benchmark-disable", "--threads", "1"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout, "reference and torch"
    assert "no path native" in done.stdout, "and why the others are left out"


def test_the_training_run_is_measured_beside_the_cost_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location(
        "bench_training_run", ROOT / "benchmarks" / "bench_training_run.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    recipe, saved = tmp_path / "tiny.json", tmp_path / "rows.jsonl"
    recipe.write_text(json.dumps(tiny_recipe().to_dict()))
    options = ["--device", "cpu", "--gpu", "h100", "--warmup", "1", "--steps", "3"]
    module.main([str(recipe), *options, "--set", "lr=1e-4", "--save", str(saved)])
    (row,) = rows.read_lines(saved)
    assert len(row["samples_s"]) == 3 and row["batch"] == 8 and row["op"] == "training_run"
    assert row["extra"]["recipe"]["lr"] == 1e-4
    parts = [row["extra"]["log"][f"share_{part}"] for part in PARTS]
    assert min(parts) > 0 and sum(parts) < 1.01
    printed = capsys.readouterr().out
    assert "expected" in printed and f"{8 / statistics.median(row['samples_s']):,.0f}" in printed
