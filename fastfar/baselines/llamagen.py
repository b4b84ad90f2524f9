"""LlamaGen, class-conditional: B (111 M), L (343 M) and XL (775 M), 256 codes of a 16x16 grid.

As published (FoundationVision/LlamaGen, autoregressive/sample/sample_c2i.py with its defaults and
autoregressive/models/generate.py): bfloat16 weights and activations, caches for 264 positions that
are allocated for every batch and read whole under a mask, attention spelled out ("math") from the
second position on, guidance scale 4 by a doubled batch, top_k 2000, top_p and temperature 1,
torch.compile off; the tokenizer in float32. (Its FID is measured without top_k, at guidance scale
1.75 to 2; neither changes the work.)

Source: LlamaGen, arXiv 2406.06525.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastfar.baselines._baseline import Baseline, Settings, make, num_parameters
from fastfar.baselines.llamagen_transformer import (
    LlamaGenConfig,
    Transformer,
    WellRun,
    pack,
)
from fastfar.baselines.llamagen_vq import UNUSED, VQDecoder
from fastfar.profiling import annotate

CONFIGS = {
    "llamagen_b": LlamaGenConfig(depth=12, width=768, heads=12),
    "llamagen_l": LlamaGenConfig(depth=24, width=1024, heads=16),
    "llamagen_xl": LlamaGenConfig(depth=36, width=1280, heads=20),
}
GUIDANCE_SCALE = 4.0


@dataclass(frozen=True)
class SamplingRule:
    """How a code is drawn from logits: temperature, then top_k, then top_p.

    Attributes:
        top_k: keep the likeliest codes, and those that tie with the last of them; 0 keeps all.
        top_p: of those keep the likeliest until their probabilities exceed it; 1 keeps all.
        temperature: logits are divided by it, or by 1e-5 if that is more.

    Raises:
        ValueError: a negative top_k or temperature, or a top_p outside 0..1.
    """

    top_k: int = 2000
    top_p: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.top_k < 0 or not 0 <= self.top_p <= 1 or not 0 <= self.temperature < math.inf:
            raise ValueError(
                "a sampling rule needs top_k >= 0 (0: all), 0 <= top_p <= 1 (1: all) and a finite "
                f"temperature >= 0, got {self}"
            )

    def probabilities(self, logits_BV: Tensor) -> Tensor:
        """(B, V): of every code, 0 where it is not kept."""
        logits_BV = logits_BV / max(self.temperature, 1e-5)
        if self.top_k:
            last_B1 = logits_BV.topk(min(self.top_k, logits_BV.shape[-1])).values[:, -1:]
            logits_BV = logits_BV.masked_fill(logits_BV < last_B1, -math.inf)
        if self.top_p < 1:
            falling_BV, order_BV = logits_BV.sort(descending=True)
            reached_BV = falling_BV.softmax(dim=-1).cumsum(dim=-1) > self.top_p
            gone_BV = torch.zeros_like(reached_BV)
            gone_BV[:, 1:] = reached_BV[:, :-1]  # the code that reaches it stays
            gone_BV = gone_BV.scatter(1, order_BV, gone_BV)
            logits_BV = logits_BV.masked_fill(gone_BV, -math.inf)
        return logits_BV.softmax(dim=-1)


class LlamaGen(Baseline):
    """LlamaGen; what its two forms share.

    `tokens` returns the codes, (B, 256) int64 row by row. Its `noise` is (256, B, 16384) float32
    draws of the unit exponential distribution: the code with the largest p / draw is taken, which
    happens with probability p. `torch.multinomial` draws the same way, so with generators in the
    same state both forms draw the same. A guidance scale of at most 1 is none: no doubled batch.

    Attributes:
        config: sizes.
        sampling: the `SamplingRule`; may be replaced.

    Args:
        config: None is what the name says.
        tokenizer_dtype: None is that of the transformer.
        ways: of this form, less its dtype.
    """

    def __init__(
        self,
        name: str,
        settings: Settings,
        config: LlamaGenConfig | None,
        tokenizer_dtype: torch.dtype | None,
        ways: str,
    ) -> None:
        self.config = config = config or CONFIGS[name]
        self.sampling = SamplingRule()
        dtype = settings.compute_dtype(torch.bfloat16)
        self.model = make(lambda: Transformer(config), settings, "model", dtype)
        self.tokenizer = make(
            lambda: VQDecoder(well_run=settings.form == "well_run"),
            settings,
            "tokenizer",
            tokenizer_dtype or dtype,
            ignored=UNUSED,
        )
        super().__init__(
            name,
            settings,
            title=f"LlamaGen-{name.rpartition('_')[2].upper()}",
            dtype=dtype,
            steps=config.grid**2,
            guidance_scale=GUIDANCE_SCALE,
            num_parameters=num_parameters(self.model),
            ways=f"{str(dtype).removeprefix('torch.')} weights, {ways}",
        )
        self._positions_S = torch.arange(self.steps, device=self.device)

    @torch.inference_mode()
    def logits(
        self, labels_B: Tensor, codes_BS: Tensor, guidance_scale: float | None = None
    ) -> Tensor:
        """(B, S + 1, V) float32: guided logits of the first S + 1 codes, the first S being given.

        For tests: a code drawn differently, by a rounding, would change all that follow. Computed
        step by step by what `tokens` runs, compiled where that is compiled.
        """
        labels_B, found = self._checked(labels_B), []
        scale = self._scale(guidance_scale)
        x_MD = self._start(labels_B, scale)
        for step in range(codes_BS.shape[1] + 1):
            found.append(self._forced(x_MD, step, scale).clone())
            if step < codes_BS.shape[1]:
                x_MD = self._embedded(codes_BS[:, step], scale)
        return torch.stack(found, dim=1)

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
        race_SBV = self._checked_noise(noise, len(labels_B))
        scale = self._scale(guidance_scale)
        codes_BS = labels_B.new_empty(len(labels_B), self.steps)
        x_MD = self._start(labels_B, scale)
        for step in range(self.steps):
            race_BV = None if race_SBV is None else race_SBV[step]
            codes_BS[:, step] = self._codes(x_MD, step, scale, greedy, race_BV, generator)
            x_MD = self._embedded(codes_BS[:, step], scale)
        return codes_BS

    def _scale(self, guidance_scale: float | None) -> float | None:
        """What multiplies, None where that is nothing: guidance up to 1 is not computed."""
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        return scale if scale > 1 else None

    def _start(self, labels_B: Tensor, scale: float | None) -> Tensor:
        """Caches, and (M, D): what the first step reads."""
        labels_M = labels_B
        if scale is not None:
            labels_M = torch.cat((labels_B, torch.full_like(labels_B, self.config.num_classes)))
        self._prepare(len(labels_M))
        return self.model.embed_class(labels_M)

    def _embedded(self, codes_B: Tensor, scale: float | None) -> Tensor:
        """(M, D): what the next step reads."""
        return self.model.embed_code(codes_B if scale is None else codes_B.repeat(2))

    @abstractmethod
    def _prepare(self, rows: int) -> None:
        """Caches for a batch of M rows."""

    @abstractmethod
    def _codes(
        self,
        x_MD: Tensor,
        step: int,
        scale: float | None,
        greedy: bool,
        race_BV: Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        """(B,) codes of one step."""

    @abstractmethod
    def _forced(self, x_MD: Tensor, step: int, scale: float | None) -> Tensor:
        """(B, V) float32: guided logits of one step, computed as `_codes` does."""

    def _decode(self, tokens: Tensor) -> Tensor:
        length = self.steps
        if tokens.is_floating_point() or tokens.dim() != 2 or tokens.shape[1] != length:
            raise ValueError(
                f"codes must be whole numbers of shape (B, {length}), got {tokens.dtype} of "
                f"{tuple(tokens.shape)}"
            )
        return (self._image(tokens).float().clamp(-1, 1) + 1) / 2

    def _image(self, codes_BS: Tensor) -> Tensor:
        images_BCHW: Tensor = self.tokenizer(codes_BS)
        return images_BCHW

    def _checked_noise(self, noise: Any, batch: int) -> Tensor | None:
        if noise is None:
            return None
        shape = (self.steps, batch, self.config.vocabulary)
        if not isinstance(noise, Tensor):
            raise TypeError(f"noise must be a tensor of shape {shape}, got {type(noise).__name__}")
        if tuple(noise.shape) != shape:
            raise ValueError(f"noise must have shape {shape}, got {tuple(noise.shape)}")
        return noise.to(self.device)


class Published(LlamaGen):
    """As the published script runs it."""

    def __init__(self, name: str, settings: Settings, config: LlamaGenConfig | None = None) -> None:
        ways = (
            "caches for all positions read whole under a mask, math attention, guidance on the "
            "logits of a doubled batch, torch.multinomial, float32 tokenizer, eager"
        )
        super().__init__(name, settings, config, torch.float32, ways)

    def _prepare(self, rows: int) -> None:
        self.model.prepare(rows)

    def _codes(
        self,
        x_MD: Tensor,
        step: int,
        scale: float | None,
        greedy: bool,
        race_BV: Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        logits_BV = self._logits(x_MD, step, scale)
        with annotate("head"):
            p_BV = self.sampling.probabilities(logits_BV)
            if greedy:
                return p_BV.topk(1).indices[:, 0]
            if race_BV is not None:
                return (p_BV / race_BV).argmax(dim=-1)
            return torch.multinomial(p_BV, 1, generator=generator)[:, 0]

    def _forced(self, x_MD: Tensor, step: int, scale: float | None) -> Tensor:
        return self._logits(x_MD, step, scale)

    def _logits(self, x_MD: Tensor, step: int, scale: float | None) -> Tensor:
        # The class runs with PyTorch's choice of attention, all that follow without fused ones.
        attention = sdpa_kernel(SDPBackend.MATH) if step else nullcontext()
        with annotate("transformer"), attention:
            h_MSD = self.model(x_MD[:, None], self._positions_S[step : step + 1])
        with annotate("head"):
            return self.model.logits(h_MSD, scale)

    def _image(self, codes_BS: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return super()._image(codes_BS)
        with torch.backends.cudnn.flags(enabled=True, deterministic=True):  # the script's setting
            return super()._image(codes_BS)


class Optimised(LlamaGen):
    """Run well."""

    def __init__(self, name: str, settings: Settings, config: LlamaGenConfig | None = None) -> None:
        compile = settings.compile
        if compile is None:
            # On a CPU nearly all the time goes into reading weights, which no fusion changes; to
            # compile a step of XL takes minutes there.
            compile = settings.device.type == "cuda"
        if compile:
            how = "SDPA on all of the cache under a mask"
            last = "torch.compile of a whole step and of the decoder"
        else:
            how, last = "SDPA on the filled part of the cache", "eager"
        ways = (
            f"{how}, fused norms and rotations, guidance before the last linear layer, no wait for "
            f"a GPU between steps, channels-last tokenizer, {last}"
        )
        super().__init__(name, settings, config, None, ways)
        self.tokenizer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if not compile and pack(self.model):
            self.ways += ", weights packed by oneDNN"
        self._runner = WellRun(self.model)
        self._static = compile
        self._advance_: Callable[..., tuple[Tensor, Tensor]] = self._advance
        if compile:
            options: dict[str, Any] = {"dynamic": False, "fullgraph": True}
            if settings.device.type == "cuda":
                options["mode"] = "reduce-overhead"  # CUDA graphs
            self._advance_ = torch.compile(self._advance, **options)
            self._image = torch.compile(self._image, **options)  # type: ignore[method-assign]

    def _prepare(self, rows: int) -> None:
        self._runner.prepare(rows)

    def _codes(
        self,
        x_MD: Tensor,
        step: int,
        scale: float | None,
        greedy: bool,
        race_BV: Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        if greedy:
            race_BV = None
        elif race_BV is None:
            race_BV = self._race(x_MD, scale).exponential_(generator=generator)
        return self._run(x_MD, step, scale, race_BV)[1]

    def _forced(self, x_MD: Tensor, step: int, scale: float | None) -> Tensor:
        return self._run(x_MD, step, scale, self._race(x_MD, scale).fill_(1))[0]

    def _race(self, x_MD: Tensor, scale: float | None) -> Tensor:
        batch = len(x_MD) if scale is None else len(x_MD) // 2
        return torch.empty(batch, self.config.vocabulary, device=self.device)

    def _run(
        self, x_MD: Tensor, step: int, scale: float | None, race_BV: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Logits and codes of one step: the likeliest where there is no race."""
        if self._static:
            with annotate("transformer"):  # with the head, which is in the same graph
                return self._advance_(x_MD, self._positions_S[step : step + 1], scale, race_BV)
        with annotate("transformer"):
            h_MD = self._runner.hidden(x_MD, step)
        with annotate("head"):
            logits_BV = self._runner.logits(h_MD, scale)
            return logits_BV, self._winners(logits_BV, race_BV)

    def _advance(
        self, x_MD: Tensor, position: Tensor, scale: float | None, race_BV: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The same where shapes must not depend on the step, without ranges: for a compiler."""
        logits_BV = self._logits(x_MD, position, scale)
        return logits_BV, self._winners(logits_BV, race_BV)

    def _logits(self, x_MD: Tensor, position: int | Tensor, scale: float | None) -> Tensor:
        return self._runner.logits(self._runner.hidden(x_MD, position), scale)

    def _winners(self, logits_BV: Tensor, race_BV: Tensor | None) -> Tensor:
        if race_BV is None:
            return logits_BV.argmax(dim=-1)
        return (self.sampling.probabilities(logits_BV) / race_BV).argmax(dim=-1)


def build(name: str, settings: Settings) -> LlamaGen:
    """What `create` calls."""
    return (Published if settings.form == "published" else Optimised)(name, settings)
