"""FLOPs of matrix products, two per multiply-add: as published, and as each way of computing does.

`reference_flops` of the head is the published arithmetic without the embeddings of time, level and
condition, which the published code repeats for every row and step: what is left is the work that
any exact implementation has to answer for. Executed FLOPs count everything that is multiplied and
wanted; padding is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastfar.config import FARConfig
from fastfar.head import TIME_FEATURES
from fastfar.kl_vae import KLVAE
from fastfar.plan import SamplingPlan
from fastfar.rows import Rows, mean_rows
from fastfar.solver import schedule


@dataclass(frozen=True)
class Head:
    """A denoising MLP at work on `tokens`, each with its conditional row and, guided, another.

    Attributes:
        tokens, halves: N, and 1 or 2 rows for each.
        width, depth, channels, condition: w, blocks, P and D.
        steps: T.
    """

    tokens: int
    halves: int
    width: int
    depth: int
    channels: int
    condition: int
    steps: int

    @classmethod
    def of(cls, config: FARConfig, tokens: int, halves: int, steps: int) -> Head:
        """The head of a model."""
        sizes = (config.head_width, config.head_depth, config.token_dim, config.width)
        return cls(tokens, halves, *sizes, steps)

    @property
    def rows(self) -> int:
        """Rows of the products."""
        return self.tokens * self.halves

    def reference_flops(self) -> int:
        """T 2 M ((5 d + 2) w^2 + 3 P w): projection, blocks, modulations, output of every row."""
        w = self.width
        return self.steps * 2 * self.rows * ((5 * self.depth + 2) * w * w + 3 * self.channels * w)

    def published_flops(self) -> int:
        """And the embeddings, per row and step, as the published code computes them."""
        w = self.width
        embeddings = (TIME_FEATURES + w + self.condition + 1) * w
        return self.reference_flops() + self.steps * 2 * self.rows * embeddings

    def hoisted_flops(self) -> int:
        """PyTorch's implementation of the op: the embeddings once, one input projection."""
        w, ends = self.width, (self.halves + 2) * self.channels  # input, then outputs
        step = self.rows * (5 * self.depth + 2) * w * w + self.tokens * ends * w
        return 2 * (self._once() + self.steps * step)

    def native_flops(self) -> int:
        """kernels/cpu/denoise_loop.cc.

        Per row and block: shift and scale 2 w^2, W_1 w^2, gate w^2, W_2 w^2; final scale w^2; each
        output twice w, of the normalised row and of the folded shift: 2 P outputs of a conditional
        row, P of an unconditional one.
        """
        w, ends = self.width, (2 * self.halves + 3) * self.channels
        step = self.rows * (5 * self.depth + 1) * w * w + self.tokens * ends * w
        return 2 * (self._once() + self.steps * step)

    def native_bytes(self, size: int = 2) -> int:
        """Bytes of the weights, which a call reads from memory at least once."""
        w = self.width
        return size * ((5 * self.depth + 1) * w * w + (self.condition + 5 * self.channels) * w)

    def _once(self) -> int:
        condition = self.rows * self.condition * self.width
        return condition + self.steps * (TIME_FEATURES + self.width) * self.width


def transformer_flops(config: FARConfig, images: int, visible: int | None = None) -> int:
    """One pass of encoder and decoder over `images` (guided: both halves).

    visible: tokens that no mask hides, which are all that the encoder gets; None: there is no mask.
    """
    tokens, width = config.num_tokens if visible is None else visible, config.width
    encoder, decoder = config.buffer_size + tokens, config.buffer_size + config.num_tokens

    def block(length: int) -> int:
        return int(length * (8 + 4 * config.mlp_ratio) * width**2 + 4 * length**2 * width)

    ends = 2 * tokens * config.token_dim * width + 2 * encoder * width**2
    blocks = config.encoder_depth * block(encoder) + config.decoder_depth * block(decoder)
    return images * (blocks + ends)


def transformer_bytes(config: FARConfig, size: int = 2) -> int:
    """Bytes of the weights of one pass."""
    depth = config.encoder_depth + config.decoder_depth
    return size * (depth * (4 + 2 * config.mlp_ratio) + 1) * config.width**2


def halves_of(plan: SamplingPlan, step: int) -> int:
    """Rows per token that an exact run needs at an outer step: 1 where guidance cancels."""
    return 1 if plan.guidance_scales[step] == 1.0 else 2


def visible_of(config: FARConfig, plan: SamplingPlan, step: int) -> int | None:
    """Tokens of an image that no mask hides at the input of an outer step; None: without masks."""
    if plan.mask_ratios is None:
        return None
    return config.num_tokens - plan.num_masked(step, config.num_tokens)


def loops_of(
    config: FARConfig, plan: SamplingPlan, step: int, rows: Rows = "seen"
) -> tuple[Head, ...]:
    """Work of the denoising MLP at an outer step of one image: a loop with guidance or without.

    Several where the solver is guided at some timesteps alone, none where it draws from moments.
    rows: of how many tokens, see `fastfar.rows`; the mean over their orders.
    """
    solver, steps = plan.solvers[step], plan.diffusion_steps[step]
    if solver.method == "moments":
        return ()
    tokens = round(mean_rows(plan, step, config, rows))
    guided = halves_of(plan, step)
    return tuple(
        Head.of(config, tokens, guided if part.guided else 1, part.last - part.first)
        for part in schedule(solver, steps, config.num_timesteps).segments
    )


@dataclass(frozen=True)
class Work:
    """FLOPs, and bytes that have to come from memory."""

    flops: int
    bytes: int

    def bound(self, peak: float, bandwidth: float) -> float:
        """Seconds that it takes at least."""
        return max(self.flops / peak, self.bytes / bandwidth)


def native_work(
    config: FARConfig, plan: SamplingPlan, vae: KLVAE | None, rows: Rows = "seen"
) -> dict[str, Work]:
    """What the native back end has to do for one image, by stage; rows: see `loops_of`."""
    transformer, head = [0, 0], [0, 0]
    for step in range(len(plan)):
        visible = visible_of(config, plan, step)
        transformer[0] += transformer_flops(config, halves_of(plan, step), visible)
        transformer[1] += transformer_bytes(config)
        for loop in loops_of(config, plan, step, rows):
            head[0] += loop.native_flops()
            head[1] += loop.native_bytes()
    return {
        "transformer": Work(*transformer),
        "head": Work(*head),
        "decode": Work(0, 0) if vae is None else decode_work(vae, config.latent_size),
    }


def reference_image_flops(config: FARConfig, plan: SamplingPlan, vae: KLVAE | None) -> int:
    """Published arithmetic of one image: both halves at every step; see `Head.reference_flops`."""
    head = sum(
        Head.of(config, config.num_tokens, 2, steps).reference_flops()
        for steps in plan.diffusion_steps
    )
    decode = 0 if vae is None else decode_work(vae, config.latent_size).flops
    return len(plan) * transformer_flops(config, 2) + head + decode


def decode_work(vae: KLVAE, latent_size: int, size: int = 2) -> Work:
    """Decoding one latent: products and convolutions; numbers of `size` bytes that these touch."""
    with torch.device("meta"):
        twin = KLVAE(vae.config)
        latent = torch.zeros(1, vae.config.latent_channels, latent_size, latent_size)
    moved = 0

    def count(layer: nn.Module, inputs: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        nonlocal moved
        weights = sum(parameter.numel() for parameter in layer.parameters())
        moved += weights + inputs[0].numel() + out.numel()

    for module in twin.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin.decode(latent)
    return Work(int(counter.get_total_flops()), size * moved)
