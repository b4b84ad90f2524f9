"""`bench_native.py head`: the denoising loop beside three baselines of PyTorch.

    reference autocast   the published loop, float32 weights under bfloat16 autocast
    hoisted bfloat16     the op's PyTorch implementation, bfloat16 weights
    compiled bfloat16    its step, all of it, by torch.compile with frozen weights and static shapes
    native               one call of the native library
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from cases import head_inputs
from timing import (
    NOT_AVAILABLE,
    Variant,
    alternate,
    figures,
    gate,
    ratio,
    relative,
)
from torch import Tensor, nn

from fastfar import FARConfig, reference
from fastfar.costs.counts import Head
from fastfar.costs.rows import duration, share, table
from fastfar.diffusion import diffusion_tables, timestep_embedding
from fastfar.ops import denoise_loop
from fastfar.ops._head import pack_head

AUTOCAST, HOISTED, COMPILED = "reference autocast", "hoisted bfloat16", "compiled bfloat16"
NATIVE, NATIVE_FLOAT32 = "native bfloat16", "native float32"
NAMES = (AUTOCAST, HOISTED, COMPILED, NATIVE, NATIVE_FLOAT32)
DEFAULT = NAMES[:4]
FACTOR, FLOOR, FLOOR_FLOAT32 = 2.0, 1e-3, 1e-6
GATE_TOKENS = 32

Run = Callable[[Tensor], Tensor]  # noise_TNP -> x_NP


class Step(nn.Module):
    """One diffusion step of the op's PyTorch implementation, with nothing left to decide.

    forward(x_NP, time_1W, base_MW, table_8, noise_NP) -> x_NP: base_MW and time_1W are the hoisted
    embeddings, table_8 the step's coefficients.
    """

    def __init__(self, head: Mapping[str, Tensor], tokens: int, scale: float) -> None:
        super().__init__()
        self.tokens, self.scale = tokens, scale
        self.guided, self.bounds = scale != 1.0, (-3.0, 3.0)
        self.depth = sum(name.endswith(".in_ln.weight") for name in head)
        layers = [*(f"res_blocks.{i}." for i in range(self.depth)), "final_layer."]
        for part in ("weight", "bias"):
            each = [head[f"{name}adaLN_modulation.1.{part}"] for name in layers]
            self.register_buffer(f"modulation_{part}", torch.cat(each))
        for name, value in head.items():
            if "adaLN" not in name and "embed" not in name:
                self.register_buffer(name.replace(".", "_"), value)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, getattr(self, name + "_weight"), getattr(self, name + "_bias"))

    def forward(
        self, x_NP: Tensor, time_1W: Tensor, base_MW: Tensor, table_8: Tensor, noise_NP: Tensor
    ) -> Tensor:
        modulation = self._linear("modulation", F.silu(base_MW + time_1W))
        parts = iter(modulation.chunk(3 * self.depth + 2, dim=-1))
        h_MW = self._linear("input_proj", x_NP.to(base_MW.dtype))
        width = h_MW.shape[-1:]
        if self.guided:
            h_MW = torch.cat([h_MW, h_MW])
        for i in range(self.depth):
            name = f"res_blocks_{i}_"
            shift, scale, gate_ = next(parts), next(parts), next(parts)
            weight, bias = getattr(self, name + "in_ln_weight"), getattr(self, name + "in_ln_bias")
            y_MW = F.layer_norm(h_MW, width, weight, bias, 1e-6) * (1.0 + scale) + shift
            y_MW = self._linear(name + "mlp_2", F.silu(self._linear(name + "mlp_0", y_MW)))
            h_MW = h_MW + gate_ * y_MW
        shift, scale = next(parts), next(parts)
        y_MW = F.layer_norm(h_MW, width, eps=1e-6) * (1.0 + scale) + shift
        eps_NP, v_NP = self._linear("final_layer_linear", y_MW[: self.tokens]).float().chunk(2, -1)
        if self.guided:
            numbers = x_NP.shape[-1]
            weight, bias = self.final_layer_linear_weight, self.final_layer_linear_bias
            free_NP = F.linear(y_MW[self.tokens :], weight[:numbers], bias[:numbers]).float()
            eps_NP = free_NP + self.scale * (eps_NP - free_NP)
        recip, recip_m1, mean_x0, mean_xt, log_low, log_high, noisy, _ = table_8.unbind()
        x0_NP = (recip * x_NP - recip_m1 * eps_NP).clamp(*self.bounds)
        fraction = (v_NP + 1.0) / 2.0
        deviation = torch.exp(0.5 * (fraction * log_high + (1.0 - fraction) * log_low))
        return mean_x0 * x0_NP + mean_xt * x_NP + noisy * deviation * noise_NP


def compiled(head: Mapping[str, Tensor], condition_MD: Tensor, level: int, initial_NP: Tensor,
             scale: float) -> Run:
    """The loop around the compiled step. Embeddings are hoisted, and part of each run."""
    dtype = torch.bfloat16
    head = {name: value.to(dtype) for name, value in head.items()}
    step = torch.compile(Step(head, len(initial_NP), scale).eval(), dynamic=False, fullgraph=True)

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, head[name + ".weight"], head[name + ".bias"])

    def run(noise_TNP: Tensor) -> Tensor:
        tables = diffusion_tables(len(noise_TNP), 1000)
        noisy = torch.ones_like(tables.recip)
        noisy[0] = 0.0  # no noise at the last step
        columns = (tables.recip, tables.recip_m1, tables.mean_x0, tables.mean_xt,
                   tables.log_posterior, tables.log_beta, noisy, noisy)
        table_T8 = torch.stack(columns, dim=1).float()
        features = timestep_embedding(tables.timestep).to(dtype)
        time_TW = linear("time_embed.mlp.2", F.silu(linear("time_embed.mlp.0", features)))
        level_11 = torch.full((1, 1), float(level), dtype=dtype)
        base_MW = linear("cond_embed", condition_MD.to(dtype))
        base_MW = base_MW + linear("index_cond_embed", level_11)
        x_NP = initial_NP
        for i, t in enumerate(reversed(range(len(tables)))):
            x_NP = step(x_NP, time_TW[t : t + 1], base_MW, table_T8[t], noise_TNP[i])
        return x_NP

    def frozen(noise_TNP: Tensor) -> Tensor:
        # Weights are folded at the first call, where inductor reads the setting.
        with torch.no_grad(), torch._inductor.config.patch(freezing=True):
            return run(noise_TNP)

    return frozen


def _runs(options: argparse.Namespace, arguments: Any) -> dict[str, tuple[Run, torch.dtype]]:
    """What each variant computes."""
    (head, condition_MD, level, initial_NP, _), kwargs = arguments
    # As parameters, so that autocast keeps their bfloat16 copies; it does so for leaves only.
    parameters = {name: nn.Parameter(value) for name, value in head.items()}
    halved = {name: value.bfloat16() for name, value in head.items()}
    condition_bf16 = condition_MD.bfloat16()

    def autocast(noise_TNP: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            inputs = (parameters, condition_MD, level, initial_NP, noise_TNP)
            return reference.denoise_loop(*inputs, **kwargs)

    def hoisted(noise_TNP: Tensor) -> Tensor:
        with torch.inference_mode():
            inputs = (halved, condition_bf16, level, initial_NP, noise_TNP)
            out: Tensor = denoise_loop.implementations["torch"](*inputs, **kwargs)
            return out

    runs: dict[str, tuple[Run, torch.dtype]] = {
        AUTOCAST: (autocast, torch.bfloat16),
        HOISTED: (hoisted, torch.bfloat16),
    }
    if COMPILED in options.variants:
        inputs = (head, condition_MD, level, initial_NP, kwargs["guidance_scale"])
        runs[COMPILED] = (compiled(*inputs), torch.bfloat16)
    if (launch := denoise_loop.implementations.get("native")) is not None:
        for name, dtype in ((NATIVE, torch.bfloat16), (NATIVE_FLOAT32, torch.float32)):
            if name in options.variants:
                runs[name] = (_native(launch, arguments, dtype), dtype)
    return runs


def _native(launch: Callable[..., Tensor], arguments: Any, dtype: torch.dtype) -> Run:
    """The native op with a head that is packed beforehand, as a model's is at load."""
    (head, condition_MD, level, initial_NP, _), kwargs = arguments
    packed_head: list[Any] = []

    def run(noise_TNP: Tensor) -> Tensor:
        if not packed_head:  # here, so that an error is one of this variant
            packed_head.append(pack_head(head, dtype))
        with torch.inference_mode():
            return launch(packed_head[0], condition_MD, level, initial_NP, noise_TNP, **kwargs)

    return run


def _executed(name: str, work: Head) -> int:
    if name == AUTOCAST:
        return work.published_flops()
    return work.native_flops() if name.startswith("native") else work.hoisted_flops()


def _gate(arguments: Any, steps: int) -> tuple[dict[torch.dtype, float], Tensor, Tensor, Tensor]:
    """Limit per dtype, float64 truth, noise, and the tokens at which results are held to it.

    The whole loop runs with `steps` diffusion steps on these arguments; as its truth is float64,
    some tokens are looked at (rows are independent). Few steps would not do: at t = 999 rounding
    decides on which bound x0 lies, and with large steps that is the result. The limit is twice the
    error of the reference in float32, for bfloat16 under autocast.
    """
    (head, condition_MD, level, initial_NP, _), kwargs = arguments
    tokens = len(initial_NP)
    noise_TNP = torch.randn(steps, *initial_NP.shape, generator=torch.Generator().manual_seed(1))
    checked = torch.linspace(0, tokens - 1, min(tokens, GATE_TOKENS)).long()
    halves_2ND = condition_MD.unflatten(0, (-1, tokens))[:, checked]
    inputs = (halves_2ND.flatten(0, 1), initial_NP[checked], noise_TNP[:, checked])

    def published(dtype: torch.dtype) -> Tensor:
        weights = {name: value.to(dtype) for name, value in head.items()}
        few_MD, few_NP, few_TNP = (x.to(dtype) for x in inputs)
        with torch.no_grad():
            return reference.denoise_loop(weights, few_MD, level, few_NP, few_TNP, **kwargs)

    truth = published(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = published(torch.float32)
    limits = {
        torch.bfloat16: FACTOR * relative(rounded, truth) + FLOOR,
        torch.float32: FACTOR * relative(published(torch.float32), truth) + FLOOR_FLOAT32,
    }
    return limits, truth, noise_TNP, checked


def bench(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Print the table; returns its rows."""
    halves = 1 if options.guidance == 1.0 else 2
    tokens = max(1, options.rows // halves)
    config = dataclasses.replace(
        FARConfig(), width=options.condition, num_heads=1, head_depth=options.depth,
        head_width=options.width, latent_channels=options.channels,
    )
    work = Head.of(config, tokens, halves, options.steps)
    torch.manual_seed(0)
    arguments = head_inputs(config, tokens, options.steps, torch.float32, halves)
    arguments[1]["guidance_scale"] = options.guidance
    noise_TNP = arguments[0][-1]
    runs = _runs(options, arguments)

    limits, truth, few_TNP, checked = _gate(arguments, options.gate_steps)
    variants = []
    for name in options.variants:
        run, dtype = runs.get(name, (None, torch.bfloat16))
        variant = Variant(name, dtype, None, _executed(name, work))
        variants.append(variant)
        if run is None:
            variant.note = "no native implementation registered"
            continue
        variant.run = lambda run=run: run(noise_TNP)
        gate(variant, lambda run=run: run(few_TNP)[checked], truth, limits[dtype])
    alternate(variants, options.repeats)

    lines, rows = [], []
    by_name = {variant.name: variant for variant in variants}
    baselines = [by_name[name] for name in (AUTOCAST, COMPILED) if name in by_name]
    for variant in variants:
        if not variant.samples:
            lines.append([variant.name, NOT_AVAILABLE, variant.note])
            continue
        row = figures(variant, work.reference_flops())
        versus = {each.name: ratio(variant, each) for each in baselines}
        lines.append([
            variant.name,
            duration(variant.median / options.steps),
            f"{row['reference_flops_per_s'] / 1e12:.3f}",
            f"{row['executed_flops_per_s'] / 1e12:.3f}",
            share(row.get("share_of_peak")),
            share(row.get("best_share_of_best_peak")),
            f"{variant.error:.1e}",
            *versus.values(),
        ])
        rows.append({
            "op": "denoise_loop",
            "backend": variant.name,
            "dtype": str(variant.dtype).removeprefix("torch."),
            "shape": f"{work.rows} rows, w {work.width}, d {work.depth}, D {work.condition}",
            **dataclasses.asdict(work),
            **row,
            "step_s": variant.median / options.steps,
            "ratio_to": {key: value for key, value in versus.items() if key != variant.name},
        })
    print(f"denoise_loop: {rows[0]['shape'] if rows else work}, {work.channels} numbers per token, "
          f"guidance {options.guidance:g}, T {work.steps}, time per diffusion step")
    header = ["path", "per step", "reference TFLOP/s", "executed TFLOP/s", "of peak", "best",
              "error", *(f"/ {each.name}" for each in baselines)]
    print(table(header, lines))
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `head`."""
    parser.add_argument("--rows", type=int, default=512, help="rows of the head, both halves")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--condition", type=int, default=1280, help="width of the condition")
    parser.add_argument("--channels", type=int, default=16, help="numbers of a token")
    parser.add_argument("--steps", type=int, default=100, help="T; per-step figures allow fewer")
    parser.add_argument("--guidance", type=float, default=3.0, help="1: no unconditional half")
    parser.add_argument("--gate-steps", type=int, default=50, help="T of the correctness gate")
    parser.add_argument("--variants", nargs="+", choices=NAMES, default=list(DEFAULT))
