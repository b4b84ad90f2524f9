"""Time to decode latents with KL-16, beside the published way and the convolutions alone.

    python benchmarks/bench_decode.py --batch 1 8 --repeats 7
    python benchmarks/bench_decode.py --threads 2 --save

Random weights (time does not depend on them), 16 x 16 latents to 256 x 256 images. The variants:

    autocast      float32 weights in PyTorch's NCHW modules under bfloat16 autocast: as published
    torch         fastfar on PyTorch, bfloat16, channels-last
    native        fastfar's native back end, bfloat16
    convolutions  the decoder's convolutions one after the other on channels-last bfloat16 inputs of
                  their own, through PyTorch with plain weights: no norms, no sums, no upsampling

They take turns, so that a machine that slows down slows all of them. No ratio is printed for one
whose error to the float64 decoder is more than twice that of plain bfloat16.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rows import RESULTS, append, environment, quantiles
from torch import Tensor, nn

from fastfar import KLVAE
from fastfar.decoding import decode_latents

SIZE = 16  # of the latent
FACTOR = 2.0
Decode = Callable[[Tensor], Tensor]


def published(vae: KLVAE) -> Decode:
    """float32 weights, NCHW, under autocast."""

    def decode(latents: Tensor) -> Tensor:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            return vae.to_images(latents)

    return decode


def on(vae: KLVAE, backend: str) -> Decode:
    """fastfar on a back end in bfloat16."""
    return lambda latents: decode_latents(vae, latents, backend, torch.bfloat16)


class Convolutions:
    """The convolutions of a decoder, each on an input of the size that it has in there."""

    def __init__(self, vae: KLVAE, latents: Tensor) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        vae = copy.deepcopy(vae).bfloat16()

        def seen(layer: nn.Module, args: tuple[Tensor, ...], scale: int = 1) -> None:
            assert isinstance(layer, nn.Conv2d) and layer.bias is not None
            batch, channels, height, width = args[0].shape
            x = torch.randn(batch, channels, scale * height, scale * width).bfloat16()
            weight = layer.weight.contiguous(memory_format=torch.channels_last)
            self.calls.append((x.contiguous(memory_format=torch.channels_last), weight, layer.bias))

        for name, layer in vae.named_modules():
            if name.endswith("upsample.conv"):  # not called as a module: its parent is
                vae.get_submodule(name.removesuffix(".conv")).register_forward_pre_hook(
                    lambda parent, args: seen(parent.conv, args, scale=2)
                )
            elif isinstance(layer, nn.Conv2d):
                layer.register_forward_pre_hook(seen)
        with torch.inference_mode():
            vae.to_images(latents)

    @property
    def flops(self) -> int:
        """Two per multiply-add."""
        return sum(
            2 * w.numel() * x.shape[0] * x.shape[2] * x.shape[3] for x, w, _ in self.calls
        )

    @torch.inference_mode()
    def __call__(self, latents: Tensor) -> Tensor:
        out = latents
        for x, weight, bias in self.calls:
            out = torch.nn.functional.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)
        return out


def gates(vae: KLVAE, variants: dict[str, Decode]) -> dict[str, tuple[float, bool]]:
    """Relative error of each variant on a small latent, and whether it is small enough."""
    latents = vae.scale * torch.randn(1, vae.config.latent_channels, 4, 4)
    with torch.inference_mode():
        truth = copy.deepcopy(vae).double().to_images(latents.double())
        plain = copy.deepcopy(vae).bfloat16().to_images(latents)

    def error(out: Tensor) -> float:
        return float((out.double() - truth).norm() / truth.norm())

    limit = FACTOR * error(plain)
    errors = {name: error(decode(latents)) for name, decode in variants.items()}
    return {name: (value, value <= limit) for name, value in errors.items()}


def measure(variants: dict[str, Decode], latents: Tensor, repeats: int) -> dict[str, list[float]]:
    """Seconds of every run after a first one; the variants take turns."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, decode in variants.items():
            start = time.perf_counter()
            decode(latents)
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="images per run")
    parser.add_argument("--repeats", type=int, default=5, help="runs of every variant")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--save", action="store_true", help=f"append to {RESULTS.name}/")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    vae = KLVAE().eval().requires_grad_(False)
    decoders = {"autocast": published(vae), "torch": on(vae, "torch"), "native": on(vae, "native")}
    checked = gates(vae, decoders)
    here, rows = environment(), list[dict[str, Any]]()
    print(f"KL-16 decoding, bfloat16; {here['cpu']}, {here['threads']} threads, "
          f"torch {here['torch']}, {here['commit']}")
    print(f"{'batch':>5}  {'path':<13} {'median s':>9} {'TFLOP/s':>8} {'error':>8}  "
          "speed-up  of the convolutions' time")
    for batch in options.batch:
        latents = vae.scale * torch.randn(batch, vae.config.latent_channels, SIZE, SIZE)
        convolutions = Convolutions(vae, latents)
        times = measure({**decoders, "convolutions": convolutions}, latents, options.repeats)
        alone = quantiles(times["convolutions"])["median_s"]
        base = quantiles(times["autocast"])["median_s"]
        for name, seconds in times.items():
            figures, (error, good) = quantiles(seconds), checked.get(name, (None, True))
            median, rate = figures["median_s"], convolutions.flops / figures["median_s"]
            shown = "" if error is None else f"{error:.1e}"
            ratio = f"{base / median:.2f} x" if good else "gate is red"
            print(f"{batch:>5}  {name:<13} {median:>9.3f} {rate / 1e12:>8.2f} {shown:>8}  "
                  f"{ratio:>8}  {median / alone:.2f}")
            rows.append({
                "op": "decode_latents",
                "model": "KL-16 (random weights)",
                "backend": name,
                "dtype": "bfloat16",
                "shape": f"batch {batch}, {SIZE} x {SIZE} to {SIZE * 16} x {SIZE * 16}",
                "batch": batch,
                **figures,
                "flops": convolutions.flops,
                "flops_per_s": rate,
                "speed_up_over": {"autocast": base / median} if good else None,
                "times_of_convolutions": median / alone,
                "error": error,
                "gate": "green" if good else "red",
                **here,
            })
    if options.save:
        path = RESULTS / "decode.jsonl"
        append(path, rows)
        print(f"{len(rows)} rows added to {path}")


if __name__ == "__main__":
    main()
