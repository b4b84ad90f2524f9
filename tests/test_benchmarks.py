"""The benchmarks compute what they say they time; nothing is timed here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tolerances import assert_close_to_reference, joined

from benchmarks import peak, rows
from benchmarks.cases import CASES, PRESETS, STEPS
from fastfar import KLVAE, FARConfig, SamplingPlan
from fastfar.costs import counts

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
    out = joined(case.op(*args, **kwargs))
    assert out.isfinite().all()
    assert case.bytes_moved((args, kwargs), out) > out.numel() * 4
    again, _ = case.inputs(DEMO, 2, torch.float32)
    repeated = joined(case.op(*again, **kwargs))
    assert torch.equal(repeated, out), "the same seed gives the same inputs"


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


def test_the_yardstick_measures() -> None:
    if (missing := peak.reason()) is not None:
        pytest.skip(f"no yardstick: {missing}")
    for dtype in (torch.float32, torch.bfloat16):
        stick = peak.Yardstick(dtype, threads=1, seconds=1e-4)
        assert 1e8 < stick() < 1e14
    assert 1e7 < peak.bandwidth(1, "L2", repeats=1) < 1e13
    assert 1e7 < peak.bandwidth(1, size=1 << 20, repeats=1) < 1e13
    with pytest.raises(ValueError, match="float64"):
        peak.Yardstick(torch.float64)
    with pytest.raises(ValueError, match="level"):
        peak.bandwidth(1, "L9")


def run_script(name: str, *options: str) -> str:
    """Standard output of a benchmark on one thread."""
    done = subprocess.run(
        [sys.executable, f"benchmarks/{name}", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


TINY = {
    "head": "--rows 6 --width 16 --condition 16 --depth 1 --channels 4 --steps 2 --gate-steps 4 "
    "--variants reference autocast|hoisted bfloat16|native bfloat16|native float32",
    "op": "--presets demo --ops attention filter_mask_patchify --lengths",
    "image": "--diffusion-steps 2 --outer-steps 2 --gate-diffusion-steps 2 --extrapolate 1 2",
}


@pytest.mark.parametrize("mode", TINY)
def test_native_benchmark_runs(mode: str) -> None:
    """Every mode prints one line per variant, or that it is not available, and no error."""
    options = TINY[mode].split("--variants ")
    names = ["--variants", *options[1].split("|")] if len(options) > 1 else []
    out = run_script(
        "bench_native.py", mode, *options[0].split(), *names, "--repeats", "1", "--threads", "1"
    )
    lines = [line for line in out.splitlines() if "native " in line]
    assert lines, out
    if peak.reason() is None:
        assert "not available" not in out and "Error" not in out, out
        assert "%" in lines[-1] or "native stage" in lines[-1], out
    else:
        assert "not available" in out, out
