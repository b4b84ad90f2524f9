"""MAR: masked autoregression over continuous tokens, FAR's transformer and head without levels.

All tokens start masked. At outer step k of K the encoder sees the class and the tokens reached so
far, the decoder gives a condition for every token, and the head samples those that are next in a
random order; a cosine schedule says how many. With the published K = 256 that is one token per
step: the encoder works on 64 + k positions and the head on one row per image and half.

Published sampling: 256 steps of 100 diffusion steps, guidance rising linearly with the share of
reached tokens to 2.9, 3.0 and 3.2 (B, L, H), temperature 1; float32 weights under autocast (on a
GPU float16, PyTorch's default there), all rows doubled for guidance, the decoder under autocast.

Source: MAR, arXiv 2406.11838; LTH14/mar: models/mar.py (`sample_tokens`), engine_mar.py
(`evaluate`), README.md (evaluation). Keys and shapes are those of the published state dicts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastfar.baselines._baseline import Baseline, Settings, make, num_parameters
from fastfar.baselines._mar_noise import Draws, Injected, MARNoise
from fastfar.baselines._mar_published import Published
from fastfar.baselines._mar_well_run import WellRun
from fastfar.config import FARConfig
from fastfar.diffloss import DiffLoss
from fastfar.kl_vae import KLVAE, KLVAEConfig
from fastfar.model import FAR
from fastfar.ops import use_backend
from fastfar.profiling import annotate

TEMPERATURE = 1.0
# Random weights do not predict noise: without bounds on x0, tokens would grow to 1e4.
RANDOM_X0_RANGE = (-3.0, 3.0)
IGNORED = ("loss.", "encoder.", "quant_conv.")  # of the KL-16 file: what decoding has no use for

_BASE = FARConfig()
CONFIGS = {
    "mar_base": _BASE,
    "mar_large": replace(
        _BASE,
        width=1024,
        encoder_depth=16,
        decoder_depth=16,
        num_heads=16,
        head_depth=8,
        head_width=1280,
    ),
    "mar_huge": replace(
        _BASE,
        width=1280,
        encoder_depth=20,
        decoder_depth=20,
        num_heads=16,
        head_depth=12,
        head_width=1536,
    ),
}
GUIDANCE_SCALES = {"mar_base": 2.9, "mar_large": 3.0, "mar_huge": 3.2}


class MARNetwork(FAR):
    """FAR's encoder-decoder with MAR's head, which has no level input.

    Args:
        config: sizes; levels and filter mean nothing here.
    """

    def __init__(self, config: FARConfig) -> None:
        super().__init__(config)
        self.diffloss = DiffLoss(
            config.token_dim,
            config.width,
            config.head_depth,
            config.head_width,
            level_input=False,
            num_timesteps=config.num_timesteps,
            backend=None,
        )


def masked_counts(num_tokens: int, steps: int) -> tuple[int, ...]:
    """Masked tokens before each outer step, and 0 after the last: steps + 1 numbers.

    After step k floor(L cos(pi/2 (k + 1) / K)) are left, but at least one less than before.

    Raises:
        ValueError: `steps` is not in 1..num_tokens.
    """
    if not 1 <= steps <= num_tokens:
        raise ValueError(f"steps must lie in 1..{num_tokens}, a token each, got {steps}")
    counts = [num_tokens]
    for k in range(1, steps):
        scheduled = math.floor(num_tokens * math.cos(math.pi / 2 * k / steps))
        counts.append(max(1, min(counts[-1] - 1, scheduled)))
    return (*counts, 0)


class MAR(Baseline):
    """MAR with the KL-16 decoder.

    Args:
        name, settings: as given to `create`.
        config: sizes of the network.
        title, guidance_scale: see `Baseline`.
        steps: K, outer steps.
        diffusion_steps: T of each.
        tokenizer: sizes of the autoencoder; None is KL-16.

    `tokens` returns (B, C, H, W) float32 latents. `noise` is a `MARNoise`; `draw_noise` makes one.
    With equal generators both forms draw the same numbers on a CPU.

    `tokens(timed_steps=...)` runs these steps alone, each with as many reached tokens (random ones)
    as in a whole run, so that lengths and masks are the real ones; tokens of other steps are 0 in
    the result. Then `step_seconds` has the time of each, `fixed_seconds` that of what happens once
    per call (autocast's copies of the weights), and `extrapolated_seconds()` that of all steps.
    """

    extrapolates = True

    def __init__(
        self,
        name: str,
        settings: Settings,
        config: FARConfig,
        *,
        title: str,
        guidance_scale: float,
        steps: int = 256,
        diffusion_steps: int = 100,
        tokenizer: KLVAEConfig | None = None,
    ) -> None:
        self.masked = masked_counts(config.num_tokens, steps)
        published = settings.form == "published"
        dtype = settings.compute_dtype(torch.float16)
        stored = torch.float32 if published else dtype
        network = make(lambda: MARNetwork(config), settings, "model", stored, rule=_random_weight)
        if settings.weights is None:
            _predict_the_input(network)
        network.set_attention_backend("sdpa")
        self.vae = make(lambda: _decoder(tokenizer), settings, "tokenizer", stored, ignored=IGNORED)
        super().__init__(
            name,
            settings,
            title=title,
            dtype=dtype,
            steps=steps,
            guidance_scale=guidance_scale,
            num_parameters=num_parameters(network),
            ways="",
        )
        self.config, self.network = config, network
        self.diffusion_steps = diffusion_steps
        self.fixed_seconds = 0.0
        self.step_seconds: dict[int, float] = {}
        self.runner: Published | WellRun
        x0_range = RANDOM_X0_RANGE if self.random_weights else None
        sampling = (diffusion_steps, TEMPERATURE, x0_range)
        if published:
            casts = dtype != torch.float32 and self.device.type != "meta"
            self.runner = Published(network, self.autocast, casts, *sampling)
        else:
            for layer in self.vae.modules():
                if isinstance(layer, torch.nn.Conv2d):
                    layer.weight.data = layer.weight.to(memory_format=torch.channels_last)
            compile = settings.compile
            if compile is None:  # on a CPU the products take all the time
                compile = self.device.type == "cuda"
            self.runner = WellRun(network, compile, self.device, *sampling)
        self.ways = self.runner.ways(str(dtype).removeprefix("torch."))
        if x0_range is not None:
            self.ways += f"; x0 bounded to {x0_range}, as random weights would diverge"

    def draw_noise(self, batch: int, generator: torch.Generator | None = None) -> MARNoise:
        """All draws of a run for `batch` images; the generator is on the device of the model."""
        draws = Draws(self.device, generator)
        order_BL = draws.order(batch, self.config.num_tokens)
        drawn = []
        for before, after in pairwise(self.masked):
            rows = batch * (before - after)
            drawn += list(draws.several(1 + self.diffusion_steps, rows, self.config.token_dim))
        return MARNoise(order_BL, drawn)

    def step_weights(self, timed_steps: Sequence[int]) -> tuple[float, ...]:
        """How many steps each timed one stands for; they sum to K.

        A step counts for the nearest timed one, between two for the later: range(n // 2, K, n)
        gives equal weights where n divides K, and is exact for a cost that grows linearly with k
        but for half a step.

        Raises:
            ValueError: no steps, or not increasing numbers of 0..K - 1.
        """
        timed = self._timed(timed_steps)
        ends = [(a + b + 1) // 2 for a, b in pairwise(timed)]
        return tuple(float(b - a) for a, b in pairwise([0, *ends, self.steps]))

    def extrapolated_seconds(self) -> float:
        """fixed + sum of weight * seconds: all steps, after a call of `tokens` with `timed_steps`.

        Raises:
            ValueError: there was no such call.
        """
        if not self.step_seconds:
            raise ValueError("no steps were timed: call tokens(..., timed_steps=range(8, 256, 16))")
        weights = self.step_weights(list(self.step_seconds))
        times = self.step_seconds.values()
        return self.fixed_seconds + sum(w * t for w, t in zip(weights, times, strict=True))

    def _timed(self, timed_steps: Sequence[int]) -> list[int]:
        timed = list(timed_steps)
        increasing = all(a < b for a, b in pairwise(timed))
        if not timed or not increasing or timed[0] < 0 or timed[-1] >= self.steps:
            raise ValueError(
                f"timed_steps must be increasing steps of 0..{self.steps - 1}, such as "
                f"range(8, {self.steps}, 16); got {timed}"
            )
        return timed

    def _tokens(
        self,
        labels_B: Tensor,
        *,
        generator: torch.Generator | None,
        noise: Any,
        guidance_scale: float,
        greedy: bool,
        timed_steps: Sequence[int] | None,
    ) -> Tensor:
        if greedy:
            raise ValueError("MAR's tokens are continuous, none is the likeliest: greedy=False")
        timed = None if timed_steps is None else self._timed(timed_steps)
        draws = Draws(self.device, generator)
        if noise is not None:
            draws = self._injected(noise, len(labels_B))
        with use_backend("torch"), self.runner.context():
            return self._sample(labels_B, draws, guidance_scale, timed)

    def _sample(
        self, labels_B: Tensor, draws: Draws, guidance_scale: float, timed: list[int] | None
    ) -> Tensor:
        config, batch = self.config, len(labels_B)
        start = self._clock()
        halves = 1 if guidance_scale == 1.0 else 2
        order_BL = draws.order(batch, config.num_tokens)
        class_MD = self.network.class_embedding(labels_B)
        if halves == 2:
            unconditional_BD = self.network.unconditional_embedding(batch)
            class_MD = torch.cat([class_MD, unconditional_BD])
        # Tokens that are not reached are not looked at; those of steps that do not run are random.
        shape_BLP = (batch, config.num_tokens, config.token_dim)
        tokens_BLP = torch.zeros(shape_BLP, device=self.device)
        if timed is not None:
            tokens_BLP = Draws(self.device, _generator(self.device)).several(*shape_BLP)
        result_BLP = torch.zeros_like(tokens_BLP)
        self.fixed_seconds, self.step_seconds = self._clock() - start, {}

        def run(k: int) -> None:
            before, after = self.masked[k], self.masked[k + 1]
            kept_BK = order_BL[:, before:]
            predicted_BN = order_BL[:, after:before].sort(dim=1).values
            with annotate("transformer"):
                z_MND = self.runner.transformer(
                    tokens_BLP.repeat(halves, 1, 1),
                    class_MD,
                    kept_BK.repeat(halves, 1),
                    predicted_BN.repeat(halves, 1),
                )
            scale = None
            if halves == 2:  # the published ramp leaves one token masked at the last step
                reached = 1 - max(1, after) / config.num_tokens
                # (1,), not (): as in the published code, it makes float32 of an eps of 16 bits.
                scale = torch.full((1,), 1 + (guidance_scale - 1) * reached, device=self.device)
            with annotate("head"):
                x_NP = self.runner.head(z_MND.flatten(0, 1), scale, draws)
            index_BNP = predicted_BN[..., None].expand(-1, -1, config.token_dim)
            for tokens in (tokens_BLP, result_BLP):
                tokens.scatter_(1, index_BNP, x_NP.view(index_BNP.shape))

        if timed is None:
            for k in range(self.steps):
                run(k)
        else:
            self._time(run, timed, draws)
        latent_shape = (batch, config.token_dim, config.grid_size, config.grid_size)
        return result_BLP.transpose(1, 2).reshape(latent_shape)

    def _time(self, run: Callable[[int], None], timed: list[int], draws: Draws) -> None:
        """Run the timed steps and keep their times."""

        def seconds(k: int) -> float:
            draws.go_to(k * (1 + self.diffusion_steps))
            start = self._clock()
            run(k)
            return self._clock() - start

        # The first step of a call makes autocast's copies: once more, it shows what they take.
        first = seconds(timed[0]) if self.runner.casts else 0.0
        self.step_seconds = {k: seconds(k) for k in timed}
        self.fixed_seconds += max(0.0, first - self.step_seconds[timed[0]])

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _injected(self, noise: Any, batch: int) -> Injected:
        if not isinstance(noise, MARNoise):
            raise TypeError(f"noise of MAR must be a MARNoise, got {type(noise).__name__}")
        shape = (batch, self.config.num_tokens)
        count = self.steps * (1 + self.diffusion_steps)
        if tuple(noise.order_BL.shape) != shape or len(noise.drawn) != count:
            raise ValueError(
                f"this run needs an order of shape {shape} and {count} draws, {self.steps} times "
                f"1 + {self.diffusion_steps}; the MARNoise has {tuple(noise.order_BL.shape)} and "
                f"{len(noise.drawn)}"
            )
        return Injected(noise, self.device)

    def _decode(self, tokens: Tensor) -> Tensor:
        with use_backend("torch"), self.runner.context():
            images = self.vae.decode(tokens / self.vae.scale)
        return (images.float() / 2 + 0.5).clamp(0.0, 1.0)


def build(name: str, settings: Settings) -> MAR:
    """What `create` calls."""
    title = f"MAR-{name.removeprefix('mar_')[0].upper()}"
    return MAR(name, settings, CONFIGS[name], title=title, guidance_scale=GUIDANCE_SCALES[name])


def _decoder(config: KLVAEConfig | None) -> KLVAE:
    """The half of the autoencoder that makes images."""
    vae = KLVAE(config)
    del vae.encoder, vae.quant_conv
    return vae


def _generator(device: torch.device) -> torch.Generator | None:
    """One with a fixed seed, so that both forms fill in the same tokens."""
    return None if device.type == "meta" else torch.Generator(device).manual_seed(0)


def _random_weight(key: str, shape: tuple[int, ...]) -> tuple[float, float] | None:
    """Embeddings as they are initialised; in the head, open gates but small changes."""
    if key.endswith(("_embed_learned", "mask_token", "fake_latent", "class_emb.weight")):
        return 0.0, 0.02
    if key.startswith("diffloss.net.") and key.endswith("adaLN_modulation.1.weight"):
        return 0.0, 0.3 / math.sqrt(shape[1])
    if key == "diffloss.net.final_layer.linear.weight":
        return 0.0, 0.1 / math.sqrt(shape[1])
    return None


@torch.no_grad()
def _predict_the_input(network: FAR) -> None:
    """Add to the head's output layer the transpose of its input layer, so that eps is about x.

    That is what a trained head predicts at high noise: tokens then stay near 1, and a rounding
    error does not decide which bound of x0 they end at.
    """
    head = network.head
    share = head.in_channels / head.model_channels
    head.final_layer.linear.weight[: head.in_channels] += share * head.input_proj.weight.t()

