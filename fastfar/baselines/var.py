"""VAR, visual autoregressive modelling by next-scale prediction: d16, d20, d24 and d30.

An image is ten token maps of growing size; the transformer predicts all tokens of a scale at once
from the feature map that the former scales add up to.

As published (FoundationVision/VAR, demo_sample.ipynb): weights in float32 without gradients, under
inference mode and float16 autocast, which then converts every weight anew in every call; keys and
values concatenated; eager; guidance by a doubled batch; top_k 900 and top_p 0.95 by a sort of the
whole vocabulary; guidance scale 4 (1.5 and top_p 0.96 for its FID), more_smooth off.

Source: VAR, arXiv 2404.02905.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastfar import graphs
from fastfar.baselines._baseline import Baseline, Settings, make, num_parameters
from fastfar.baselines._vqgan import attend, attend_published
from fastfar.baselines.var_transformer import (
    ENDS,
    HEAD_WIDTH,
    LENGTHS,
    TOTAL,
    Published,
    Transformer,
    WellRun,
    training_buffers,
)
from fastfar.baselines.var_vae import CHANNELS, IGNORED, SIDES, VOCABULARY, VQVAE
from fastfar.profiling import annotate

GUIDANCE_SCALE = 4.0
TOP_K = 900
TOP_P = 0.95


def guided(logits_MLV: Tensor, guidance_scale: float, scale: int) -> Tensor:
    """(1 + t) conditional - t unconditional, t = guidance_scale * scale / 9: none at the first."""
    t = guidance_scale * scale / (len(SIDES) - 1)
    conditional_BLV, unconditional_BLV = logits_MLV.chunk(2)
    return (1 + t) * conditional_BLV - t * unconditional_BLV


def sample_published(
    logits_BLV: Tensor,
    top_k: int,
    top_p: float,
    generator: torch.Generator | None,
    race_BLV: Tensor | None,
) -> Tensor:
    """(B, L) codes, drawn as the published code draws them: two masks, one full sort.

    Writes over the logits.

    top_k: the likeliest codes stay, and those that tie with the last of them.
    top_p: of those, the least likely go as long as their probabilities add up to 1 - top_p or less.
    race_BLV: exponential draws, in place of those that `torch.multinomial` takes from `generator`:
        code argmax(p / race) wins, with probability p.
    """
    least = logits_BLV.topk(top_k, sorted=False).values.amin(dim=-1, keepdim=True)
    logits_BLV.masked_fill_(logits_BLV < least, -math.inf)
    ascending, order = logits_BLV.sort(dim=-1)
    gone = ascending.softmax(dim=-1).cumsum_(dim=-1) <= 1 - top_p
    gone[..., -1] = False
    logits_BLV.masked_fill_(gone.scatter(-1, order, gone), -math.inf)
    p_BLV = logits_BLV.softmax(dim=-1)
    if race_BLV is not None:
        return (p_BLV / race_BLV).argmax(dim=-1)
    drawn = torch.multinomial(p_BLV.flatten(0, 1), 1, replacement=True, generator=generator)
    return drawn.view(p_BLV.shape[:2])


def sample_well_run(logits_BLV: Tensor, top_k: int, top_p: float, race: Tensor) -> Tensor:
    """The same rule on the `top_k` codes alone, which are all that is sorted.

    race: exponential draws (B, L, top_k) by rank, or (B, L, V) by code.
    """
    top_BLK, codes_BLK = logits_BLV.topk(top_k)
    p_BLK = top_BLK.softmax(dim=-1)
    # Code k goes if it and all below it add up to 1 - top_p or less; the first never does.
    gone = 1 - (p_BLK.cumsum(dim=-1) - p_BLK) <= 1 - top_p
    race_BLK = race.gather(-1, codes_BLK) if race.shape[-1] == logits_BLV.shape[-1] else race
    winner_BL1 = (p_BLK.masked_fill(gone, 0) / race_BLK).argmax(dim=-1, keepdim=True)
    return codes_BLK.gather(-1, winner_BL1).squeeze(-1)


class VAR(Baseline):
    """VAR in one of its forms.

    `tokens` returns f_hat, (B, 32, 16, 16) float32. Its `noise` is (B, 680, 4096) float32 draws of
    the unit exponential distribution, scale after scale, row by row: the code with the largest
    p / draw is taken, which happens with probability p.

    Args:
        depth, width: of the transformer; None is what the name says, and 64 * depth.
    """

    runner: Published | WellRun

    def __init__(
        self, name: str, settings: Settings, depth: int | None = None, width: int | None = None
    ) -> None:
        depth = depth or int(name.removeprefix("var_d"))
        width = width or HEAD_WIDTH * depth
        published = settings.form == "published"
        dtype = settings.compute_dtype(torch.float16)
        weights_dtype = torch.float32 if published else dtype
        self.model = model = make(
            lambda: Transformer(depth, width),
            settings,
            "model",
            weights_dtype,
            rule=_random_weight,
            constants=_constants(depth, width),
        )
        # Of the tokenizer only the decoder is large: the codebook and phis stay in float32.
        self.vae = make(
            lambda: VQVAE(attend_published if published else attend),
            settings,
            "tokenizer",
            torch.float32,
            ignored=IGNORED,
        )
        compile = settings.device.type == "cuda" and not published
        if settings.compile is not None:
            compile = settings.compile
        super().__init__(
            name,
            settings,
            title=f"VAR-d{depth}",
            dtype=dtype,
            steps=len(SIDES),
            guidance_scale=GUIDANCE_SCALE,
            num_parameters=num_parameters(model),
            ways=_ways(settings, dtype, compile),
        )
        if published:
            self.runner = Published(model)
        else:
            for part in (self.vae.decoder, self.vae.post_quant_conv):
                part.to(dtype)
                part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.runner = WellRun(model, compile)
        self._image_of = torch.compile(self.vae, dynamic=False) if compile else self.vae
        self._graphs: dict[tuple[object, ...], graphs.Graphed] = {}

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
        if noise is not None:
            noise = _checked_noise(noise, len(labels_B)).to(self.device)
        if self.form == "published":
            with self.autocast():
                return self._image(labels_B, noise, guidance_scale, greedy, generator)
        if noise is None and not greedy:
            noise = torch.empty(len(labels_B), TOTAL, TOP_K, device=self.device)
            noise.exponential_(generator=generator)
        arguments = (labels_B,) if noise is None else (labels_B, noise)

        def image(labels_B: Tensor, noise: Tensor | None = None) -> Tensor:
            return self._image(labels_B, noise, guidance_scale, greedy, None)

        if not graphs.wanted(self.device):
            return image(*arguments)
        key = (tuple(tuple(each.shape) for each in arguments), guidance_scale, greedy)
        assert isinstance(self.runner, WellRun)
        if self.runner.reserve(2 * len(labels_B)):
            self._graphs.clear()  # they were recorded with buffers that are gone
        if key not in self._graphs:
            self._graphs[key] = graphs.Graphed(image, arguments)
        return self._graphs[key](*arguments)

    def _image(
        self,
        labels_B: Tensor,
        noise: Tensor | None,
        guidance_scale: float,
        greedy: bool,
        generator: torch.Generator | None,
    ) -> Tensor:
        """All scales of an image."""
        quantize, side = self.vae.quantize, SIDES[-1]
        x_MLD = self.runner.start(labels_B)
        f_hat_BCHW = x_MLD.new_zeros(len(labels_B), CHANNELS, side, side, dtype=torch.float32)
        for scale in range(len(SIDES)):
            with annotate("transformer"):
                if scale:
                    x_MLD = self.runner.embed(quantize.shrunk(f_hat_BCHW, scale), scale)
                h_MLD = self.runner.blocks(x_MLD, scale)
            with annotate("head"):
                logits_BLV = guided(self.runner.logits(h_MLD), guidance_scale, scale)
                start = ENDS[scale] - LENGTHS[scale]
                race = None if noise is None else noise[:, start : ENDS[scale]]
                codes_BL = self._codes(logits_BLV, race, greedy, generator)
                f_hat_BCHW = quantize.add(f_hat_BCHW, codes_BL, scale)
        return f_hat_BCHW

    def _codes(
        self,
        logits_BLV: Tensor,
        race: Tensor | None,
        greedy: bool,
        generator: torch.Generator | None,
    ) -> Tensor:
        if greedy:
            return logits_BLV.argmax(dim=-1)
        if self.form == "published":
            return sample_published(logits_BLV, TOP_K, TOP_P, generator, race)
        assert race is not None
        return sample_well_run(logits_BLV, TOP_K, TOP_P, race)

    def _decode(self, tokens: Tensor) -> Tensor:
        if self.form == "published":
            with self.autocast():
                image_BCHW: Tensor = self.vae(tokens)
        else:
            image_BCHW = self._image_of(tokens.to(self.dtype))
        return image_BCHW.float()


def build(name: str, settings: Settings) -> VAR:
    """What `create` calls."""
    return VAR(name, settings)


def _constants(depth: int, width: int) -> dict[str, Tensor]:
    """Buffers of the published file; none of them is learned."""
    zeros = torch.zeros(width)
    return {
        **training_buffers(),
        **{f"blocks.{i}.attn.zero_k_bias": zeros for i in range(depth)},
    }


def _random_weight(key: str, shape: tuple[int, ...]) -> tuple[float, float] | None:
    """Class embeddings near 1, so that gates are open; attention's scale as training starts."""
    if key.startswith("class_emb"):
        return 0.0, 1.0
    if key.startswith(("pos_", "lvl_embed")):
        return 0.0, 0.1
    if key.endswith("scale_mul_1H11"):
        return math.log(4), 0.0
    return None


def _checked_noise(noise: Any, batch: int) -> Tensor:
    shape = (batch, TOTAL, VOCABULARY)
    if not isinstance(noise, Tensor):
        raise TypeError(f"noise must be a tensor of shape {shape}, got {type(noise).__name__}")
    if tuple(noise.shape) != shape:
        raise ValueError(f"noise must have shape {shape}, got {tuple(noise.shape)}")
    return noise


def _ways(settings: Settings, dtype: torch.dtype, compile: bool) -> str:
    kind = str(dtype).removeprefix("torch.")
    if settings.form == "published":
        how = "no autocast" if dtype == torch.float32 else f"{kind} autocast"
        return (
            f"float32 weights, {how}, SDPA, keys and values concatenated, modulations per scale, "
            "sampling by a sort of the vocabulary, eager"
        )
    on_cpu = settings.device.type == "cpu"
    packed = " packed for oneDNN" if on_cpu and dtype == torch.bfloat16 else ""
    run = "torch.compile of the decoder and between the linear layers" if compile else "eager"
    graph = ", tokens as one CUDA graph" if settings.device.type == "cuda" else ""
    return (
        f"{kind} weights{packed}, SDPA on preallocated keys and values, modulations once per "
        f"image, sampling among the top {TOP_K}, channels-last decoder, {run}{graph}"
    )
