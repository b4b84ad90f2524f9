"""What the published way of sampling costs on a GPU: eager PyTorch, float32 weights under autocast.

`fastfar.reference` stands for the published denoising loop: the same arithmetic step by step, with
the look-ups that copy a coefficient to the GPU for every use; the model as PyTorch modules stands
for the published transformer (timm's blocks, whose attention is one fused call). Their calls are
counted on fake tensors with few blocks and steps, and continued. Time is the larger of

    host      EAGER_CALL a kernel and BLOCKING_COPY a copy
    device    its kernels by the model of `kernels.py`, without launch gaps
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastfar import reference
from fastfar.config import FARConfig
from fastfar.costs.gpus import BLOCKING_COPY, EAGER_CALL, GPU
from fastfar.costs.image import Total, fake_module
from fastfar.costs.kernels import price_all
from fastfar.costs.trace import Tracer, tracing
from fastfar.model import FAR
from fastfar.ops import use_backend
from fastfar.plan import SamplingPlan


@dataclass(frozen=True)
class Eager:
    """Sums over eager calls: kernels with what they do, blocking copies to the GPU."""

    kernels: Total
    copies: float

    def __add__(self, other: Eager) -> Eager:
        return Eager(self.kernels + other.kernels, self.copies + other.copies)

    def __sub__(self, other: Eager) -> Eager:
        return Eager(self.kernels - other.kernels, self.copies - other.copies)

    def __mul__(self, factor: float) -> Eager:
        return Eager(self.kernels * factor, self.copies * factor)

    def seconds(self, gpu: GPU) -> float:
        """Expected time."""
        host = self.kernels.launches * EAGER_CALL + self.copies * BLOCKING_COPY
        device = self.kernels.seconds - self.kernels.launches * gpu.launch_gap
        return max(host, device)


@dataclass(frozen=True)
class Published:
    """The published way: one diffusion step, one pass of the transformer, the whole run."""

    gpu: GPU
    step: Eager
    transformer: Eager
    image: Eager

    @property
    def seconds(self) -> float:
        """Of the whole batch, without decoding."""
        return self.image.seconds(self.gpu)


def published(config: FARConfig, plan: SamplingPlan, gpu: GPU, batch: int = 1) -> Published:
    """Count and price the published way of sampling `batch` images, without the decoder.

    Masked plans are counted as if all tokens were visible.
    """
    small = dataclasses.replace(config, encoder_depth=2, decoder_depth=2)
    with tracing(gpu, autocast=torch.bfloat16) as tracer:
        model = fake_module(FAR, small, torch.float32)
        tracer.know(list(model.parameters()), parameters=True)  # autocast casts each once
        one, two = (_loop(tracer, model, batch, steps) for steps in (1, 2))
        step = two - one
        begin = one - step
        two, one = (_pass(tracer, model, batch, depth) for depth in (2, 1))
    # One more block of the encoder and of the decoder each.
    pairs = (config.encoder_depth + config.decoder_depth) / 2 - 1
    transformer = one + (two - one) * pairs
    image = (transformer + begin) * len(plan) + step * plan.head_calls
    return Published(gpu, step, transformer, image)


def _counted(tracer: Tracer, run: Callable[[], object]) -> Eager:
    """What the second of two runs calls: the first one casts the weights."""
    run()
    tracer.drain()
    kernels, copies = len(tracer.events), len(tracer.copies)
    run()
    tracer.drain()
    works = [event.work for event in tracer.events[kernels:]]
    return Eager(Total.of(price_all(works, tracer.gpu)), float(len(tracer.copies) - copies))


def _loop(tracer: Tracer, model: FAR, batch: int, steps: int) -> Eager:
    """A denoising loop of so many steps; the last of them adds no noise."""
    config = model.config
    head = dict(model.head.named_parameters())
    tokens = batch * config.num_tokens
    condition = torch.empty(2 * tokens, config.width, device="cuda:0")
    initial = torch.empty(tokens, config.token_dim, device="cuda:0")
    noise = torch.empty(steps, tokens, config.token_dim, device="cuda:0")
    tracer.know([condition, initial, noise])
    return _counted(
        tracer,
        lambda: reference.denoise_loop(
            head, condition, 1.0, initial, noise, guidance_scale=3.0, temperature=1.0
        ),
    )


def _pass(tracer: Tracer, model: FAR, batch: int, depth: int) -> Eager:
    """Encoder and decoder of so many blocks each over both halves, as PyTorch modules."""
    config = model.config
    model.encoder_blocks = model.encoder_blocks[:depth]
    model.decoder_blocks = model.decoder_blocks[:depth]
    tokens = torch.empty(2 * batch, config.num_tokens, config.token_dim, device="cuda:0")
    classes = torch.empty(2 * batch, config.width, device="cuda:0")
    tracer.know([tokens, classes])
    with use_backend("torch"):
        return _counted(tracer, lambda: model(tokens, classes))
