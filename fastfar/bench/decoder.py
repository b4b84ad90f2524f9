"""KL-16's decoder alone, beside its convolutions alone: part of `fastfar bench ops`.

    autocast      float32 weights in PyTorch's NCHW modules under autocast: as published
    torch         fastfar on PyTorch, channels-last
    native        fastfar's native back end (CPU)
    triton        fastfar's Triton back end (GPU)
    convolutions  the decoder's convolutions one after the other on channels-last inputs of their
                  own, through PyTorch with plain weights: no norms, no sums, no upsampling

Random weights: time does not depend on them. The last one computes no image and is not gated.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastfar import backend as backends
from fastfar.bench import ops, timing
from fastfar.bench.rows import Row
from fastfar.bench.timing import FAILURES, Contender, relative
from fastfar.costs.counts import decode_work
from fastfar.decoding import decode_latents
from fastfar.kl_vae import KLVAE

OP = "decode_latents"
PATHS = ("autocast", "torch", "native", "triton", "convolutions")
GATE_SIZE = 4  # of the latent that is decoded in float64
FLOOR = 1e-3


def measure(
    options: ops.Options, batch: int = 1, latent_size: int = 16, vae: KLVAE | None = None
) -> list[Row]:
    """Gate and time the decoder's paths in 16 bits, taking turns.

    Those of `options.paths` that a decoder does not have are left out. vae: None is KL-16 with
    random weights.
    """
    torch.manual_seed(0)
    vae = (KLVAE() if vae is None else vae).eval().requires_grad_(False).to(options.device)
    size = (batch, vae.config.latent_channels, latent_size, latent_size)
    latents = vae.scale * torch.randn(size).to(options.device)
    small = latents[:1, :, :GATE_SIZE, :GATE_SIZE].contiguous()
    with torch.inference_mode():
        truth = copy.deepcopy(vae).double().to_images(small.double())
    work = decode_work(vae, latent_size)
    contenders = []
    for dtype in (dtype for dtype in options.dtypes if dtype in ops.HALF):
        with torch.inference_mode():
            rounded = relative(copy.deepcopy(vae).to(dtype).to_images(small.to(dtype)), truth)
        for path in PATHS:
            asked = options.paths is None or path in options.paths or path == "convolutions"
            if not asked or path == ("native" if latents.is_cuda else "triton"):
                continue
            short = str(dtype).removeprefix("torch.")
            contender = Contender(f"{path} {short}", dtype, None, batch * work.flops)
            contenders.append((path, contender))
            if path == "convolutions":
                contender.run = Convolutions(vae, latents, dtype)
                continue
            try:
                decode = decoder(vae, path, dtype)
                contender.run = partial(decode, latents)
            except FAILURES as error:
                contender.give_up(error)
                continue
            limit = ops.FACTOR * rounded + FLOOR
            timing.gate(contender, partial(decode, small), truth, limit, options.device)
    ops.take_turns([each for _, each in contenders], options)
    pixels = latent_size * 2 ** (len(vae.config.channel_mults) - 1)
    shape = f"{latent_size} x {latent_size} to {pixels} x {pixels}"
    note = f"{GATE_SIZE} x {GATE_SIZE} latents against float64, twice plain 16-bit weights' error"
    job = ops.Job(OP, batch, shape, batch * work.flops, 2 * batch * work.bytes, note)
    return ops.rows_of(job, contenders, options)


def decoder(vae: KLVAE, path: str, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The function that decodes latents by a path. OSError where the path is not there."""
    if path == "autocast":
        return partial(_published, vae, dtype)
    if (reason := backends.backends()[path]) is not None:
        raise OSError(reason)
    twin = copy.deepcopy(vae)  # one converted copy is kept of each
    return lambda latents: decode_latents(twin, latents, path, dtype)


def _published(vae: KLVAE, dtype: torch.dtype, latents: Tensor) -> Tensor:
    with torch.inference_mode(), torch.autocast(latents.device.type, dtype):
        return vae.to_images(latents)


class Convolutions:
    """The convolutions of a decoder, each on an input of the size that it has in there."""

    def __init__(self, vae: KLVAE, latents: Tensor, dtype: torch.dtype) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        with torch.device("meta"):
            twin = KLVAE(vae.config)
        last = torch.channels_last

        def seen(name: str, layer: nn.Conv2d, scale: int, _: Any, args: tuple[Tensor, ...]) -> None:
            batch, channels, height, width = args[0].shape
            x = torch.randn(batch, channels, scale * height, scale * width, device=latents.device)
            weight = vae.get_parameter(name + ".weight").to(dtype, memory_format=last)
            bias = vae.get_parameter(name + ".bias").to(dtype)
            self.calls.append((x.to(dtype, memory_format=last), weight, bias))

        for name, layer in twin.named_modules():
            if not isinstance(layer, nn.Conv2d):
                continue
            if name.endswith("upsample.conv"):  # not called as a module: its parent is
                parent = twin.get_submodule(name.removesuffix(".conv"))
                parent.register_forward_pre_hook(partial(seen, name, layer, 2))
            else:
                layer.register_forward_pre_hook(partial(seen, name, layer, 1))
        with torch.inference_mode():
            twin.to_images(latents.to("meta"))

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        """The last one's output, which means nothing."""
        out = self.calls[0][0]
        for x, weight, bias in self.calls:
            out = torch.nn.functional.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)
        return out
