"""The ways to compute an image that `fastfar bench` compares.

reference    the published loop in float32, all of its arithmetic, one step at a time
autocast     the same with 16-bit autocast: how the published code is run
torch        fastfar's exact algebra on PyTorch's operators
compile      the published model and loop, its two networks and the update by torch.compile
native       fastfar's C++ kernels (CPU)
eager        fastfar's Triton kernels, launched one by one
triton       the same as a CUDA graph of the whole image
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastfar import backend as backends
from fastfar import graphs, reference
from fastfar.checkpoint import load_pretrained
from fastfar.config import FARConfig
from fastfar.decoding import decode_latents
from fastfar.diffusion import diffusion_tables, update_table
from fastfar.kl_vae import KLVAE
from fastfar.levels import unpatchify
from fastfar.model import FAR
from fastfar.noise import NoiseSource
from fastfar.ops import filter_mask_patchify
from fastfar.plan import SamplingPlan
from fastfar.profiling import annotate
from fastfar.sampling import sample_latents
from fastfar.tokenizer import PixelTokenizer

NAMES = ("reference", "autocast", "torch", "compile", "native", "eager", "triton")
_HALF = (torch.bfloat16, torch.float16)

Sampler = Callable[[Tensor, NoiseSource], Tensor]  # labels_B, noise -> latents


@dataclass(frozen=True)
class Subject:
    """What is measured: a model with its plan and the decoder of its latents."""

    name: str
    model: FAR
    tokenizer: PixelTokenizer | KLVAE
    plan: SamplingPlan

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return self.model.fake_latent.device


def subject(
    preset: str | None,
    checkpoint: str | None,
    device: torch.device,
    mode: str = "nomask",
    diffusion_steps: int | None = None,
    head_depth: int | None = None,
    guidance_scale: float | None = None,
) -> Subject:
    """A checkpoint (None: the embedded demo) with its plan, or a preset with random weights.

    Random weights let tokens grow without limit, so their plan bounds x0 to (-3, 3); time does not
    depend on it.
    """
    if preset is None:
        parts = load_pretrained(checkpoint or "demo", dtype=torch.float32)
        tokenizer = parts.tokenizer or PixelTokenizer(0.0, 1.0)
        name, model = checkpoint or "demo", parts.model
        plan = parts.plan or SamplingPlan.official(mode)
    else:
        config = sized(preset, head_depth)
        name, model = f"{preset} (random weights)", random_model(config)
        tokenizer = random_tokenizer(config)
        plan = SamplingPlan.official(mode).with_changes(x0_range=(-3.0, 3.0))
    plan = plan.with_changes(diffusion_steps=diffusion_steps, guidance_scale=guidance_scale)
    if isinstance(tokenizer, KLVAE):
        tokenizer = tokenizer.to(device)
    return Subject(name, model.to(device).eval().requires_grad_(False), tokenizer, plan)


def sized(preset: str, head_depth: int | None = None) -> FARConfig:
    """The configuration of a preset, with another depth of the head if one is given."""
    config = FARConfig.preset(preset)
    if head_depth is None:
        return config
    return FARConfig.from_dict({**config.to_dict(), "head_depth": head_depth})


def random_tokenizer(config: FARConfig) -> PixelTokenizer | KLVAE:
    """KL-16 with random weights where the latent has its channels; else pixels."""
    if config.latent_channels != 16:
        return PixelTokenizer(0.0, 1.0)
    torch.manual_seed(1)
    vae = KLVAE().eval()
    vae.requires_grad_(False)
    return vae


@torch.no_grad()
def random_model(config: FARConfig) -> FAR:
    """Random weights without closed gates, made in place: a big model is held once."""
    with torch.device("meta"):
        model = FAR(config)
    model = model.to_empty(device="cpu").eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if (parameter.ndim == 1 and "norm" in name) or name.endswith("_ln.weight"):
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            parameter.normal_(std=0.02 if "emb" in name else parameter.shape[-1] ** -0.5)
    # As after training, the variance channel stays near -1..1: outside, the noise explodes.
    model.head.final_layer.linear.weight.mul_(0.1)
    return model


@dataclass
class Variant:
    """One way to compute an image, in a dtype.

    Attributes:
        name: one of `NAMES`.
        dtype: of its products.
        note: why it cannot run; "" if it can.
        cold_s: seconds of the first run: compilation, packing, capture.
        times: seconds per batch size.
        error, limit: relative error of its latent and what is allowed.
        memory: peak bytes on a GPU, by batch size.
    """

    name: str
    dtype: torch.dtype
    note: str = ""
    cold_s: float | None = None
    times: dict[int, list[float]] = field(default_factory=dict)
    error: float | None = None
    limit: float | None = None
    memory: dict[int, int] = field(default_factory=dict)
    _tokenizer: PixelTokenizer | KLVAE | None = None

    def __str__(self) -> str:
        return f"{self.name} {str(self.dtype).removeprefix('torch.')}"

    @property
    def green(self) -> bool:
        """Whether its result is right; False for a NaN."""
        return self.error is not None and self.limit is not None and self.error <= self.limit

    @property
    def mode(self) -> str:
        """Honesty mode: "parity" in float32, "exact" where products are rounded to 16 bits."""
        return "exact" if self.dtype in _HALF else "parity"

    def sampler(self, subject: Subject) -> Sampler:
        """The function that computes latents; what it converts is kept."""
        if self.name in ("reference", "autocast"):
            return _published(subject, self.dtype if self.name == "autocast" else None)
        if self.name == "compile":
            return Compiled(subject, self.dtype)
        backend, model = self.name, subject.model
        if self.name in ("eager", "triton"):
            backend = "triton"  # both share the copy that sampling keeps of the model
        else:
            # Sampling keeps one copy of a model: paths that take turns need a model each.
            model = copy.deepcopy(model)
            if self.name == "torch":
                model = model.to(self.dtype)

        def sample(labels_B: Tensor, noise: NoiseSource) -> Tensor:
            with graphs.disabled() if self.name == "eager" else nullcontext():
                return sample_latents(
                    model, labels_B, subject.plan, noise, backend=backend, dtype=self.dtype
                )

        return sample

    def decode(self, subject: Subject, latents_BCHH: Tensor) -> Tensor:
        """Images of its latents; the published way under autocast, too."""
        device = subject.device.type
        with annotate("decode"), torch.no_grad():
            if self.name == "autocast":
                with torch.autocast(device, self.dtype):
                    return subject.tokenizer.to_images(latents_BCHH)
            if self.name == "native" and self._tokenizer is None:
                self._tokenizer = copy.deepcopy(subject.tokenizer)  # one packed copy is kept
            tokenizer = self._tokenizer or subject.tokenizer
            backend = {"eager": "triton", "compile": "torch"}.get(self.name, self.name)
            return decode_latents(tokenizer, latents_BCHH, backend, self.dtype)


def chosen(
    names: list[str] | None, device: torch.device, dtype: torch.dtype | None
) -> list[Variant]:
    """The variants by these names, None: all that make sense on the device; baselines first.

    Those that are not available get a note. ValueError for an unknown name.
    """
    if unknown := [name for name in names or () if name not in NAMES]:
        raise ValueError(f"--backends {unknown} not known; allowed: {', '.join(NAMES)}")
    on_gpu = device.type == "cuda"
    default = ("autocast", "torch", "compile", "eager", "triton") if on_gpu else (
        "reference", "autocast", "torch", "native"
    )  # fmt: skip
    variants = []
    for name in [name for name in NAMES if name in (names or default)]:
        backend = {"eager": "triton", "compile": "torch", "autocast": "torch"}.get(name, name)
        reason = backends.backends()[backend]
        if backend == "triton" and not on_gpu:
            reason = "Triton kernels run on a GPU"
        if backend == "native" and on_gpu:
            reason = "native kernels run on a CPU"
        if name == "reference" or reason is not None:
            best = torch.float32
        elif name == "autocast":
            best = torch.bfloat16
        else:
            best = backends.best_dtype(backend, device)
        if dtype is not None and name != "reference":
            best = dtype
        if name == "autocast" and best not in _HALF:
            reason = f"autocast needs a 16-bit dtype, not {best}"
        variants.append(Variant(name, best, reason or ""))
    return variants


def _published(subject: Subject, autocast: torch.dtype | None) -> Sampler:
    """The published loop. Parameters, not a state dict: autocast keeps copies of leaves only."""
    config, device = subject.model.config, subject.device
    model = copy.deepcopy(subject.model).requires_grad_(autocast is not None)
    parameters = dict(model.named_parameters())

    def sample(labels_B: Tensor, noise: NoiseSource) -> Tensor:
        with torch.no_grad(), torch.autocast(device.type, autocast, autocast is not None):
            latent: Tensor = reference.sample_latents(
                parameters,
                labels_B.to(device),
                subject.plan,
                _OnDevice(noise, device),
                num_heads=config.num_heads,
                latent_size=config.latent_size,
                patch_size=config.patch_size,
                num_levels=config.num_levels,
                kind=config.filter,
                num_timesteps=config.num_timesteps,
            )
        return latent.float()

    return sample


@dataclass(frozen=True)
class _OnDevice:
    """A noise source whose answers lie on a device."""

    source: NoiseSource
    device: torch.device

    def initial(self, step: int) -> Tensor:
        return self.source.initial(step).to(self.device)

    def steps(self, step: int, count: int) -> Tensor:
        return self.source.steps(step, count).to(self.device)

    def order(self) -> Tensor:
        return self.source.order().to(self.device)


class Compiled:
    """What a good engineer gets without writing a kernel: 16-bit weights and torch.compile.

    The transformer, and a whole diffusion step (the published head, guidance, update), are
    compiled with static shapes; on CUDA as CUDA graphs ("reduce-overhead"). Masks are not.
    """

    def __init__(self, subject: Subject, dtype: torch.dtype) -> None:
        if subject.plan.mask_ratios is not None:
            raise ValueError("the variant compile knows no masks; leave it out of --backends")
        self.subject, self.dtype = subject, dtype
        self.model = copy.deepcopy(subject.model).to(dtype)
        options: dict[str, Any] = {"dynamic": False, "fullgraph": True}
        if subject.device.type == "cuda":
            options["mode"] = "reduce-overhead"
        self.transformer = torch.compile(self.model, **options)
        self.step = torch.compile(self._step, **options)

    def _step(
        self,
        x_NP: Tensor,
        condition_MD: Tensor,
        level_M: Tensor,
        timestep_M: Tensor,
        table_8: Tensor,
        noise_NP: Tensor,
        scale: Tensor,
    ) -> Tensor:
        """One diffusion step of the published head; scale is the guidance's."""
        rows = len(x_NP)
        both_MP = x_NP.repeat(2, 1).to(self.dtype)
        out_M2P = self.model.head(both_MP, timestep_M, condition_MD, level_M).float()
        eps_MP, v_MP = out_M2P.chunk(2, dim=-1)
        eps_NP = eps_MP[rows:] + scale * (eps_MP[:rows] - eps_MP[rows:])
        x0_NP = table_8[0] * x_NP - table_8[1] * eps_NP
        if self.subject.plan.x0_range is not None:
            x0_NP = x0_NP.clamp(*self.subject.plan.x0_range)
        fraction = (v_MP[:rows] + 1.0) / 2.0
        log_variance = fraction * table_8[6] + (1.0 - fraction) * table_8[5]
        noise_NP = table_8[7] * torch.exp(0.5 * log_variance) * noise_NP
        next_NP: Tensor = table_8[2] * x_NP + table_8[3] * x0_NP + noise_NP
        return next_NP

    @torch.inference_mode()
    def __call__(self, labels_B: Tensor, noise: NoiseSource) -> Tensor:
        """Latents of the labels."""
        config, plan, device = self.model.config, self.subject.plan, self.subject.device
        batch, noise = len(labels_B), _OnDevice(noise, device)
        class_MD = torch.cat(
            [
                self.model.class_embedding(labels_B.to(device)),
                self.model.unconditional_embedding(batch),
            ]
        )
        tokens_BLP = torch.zeros(batch, config.num_tokens, config.token_dim, device=device)
        latent_BCHH = unpatchify(tokens_BLP, config.patch_size)
        for k, level in enumerate(plan.levels):
            if k > 0:
                given = plan.input_levels[k]
                levels_B = torch.full((batch,), -1 if given is None else given, device=device)
                tokens_BLP = filter_mask_patchify(
                    latent_BCHH,
                    levels_B,
                    None,
                    patch_size=config.patch_size,
                    num_levels=config.num_levels,
                    kind=config.filter,
                )
            both = tokens_BLP.repeat(2, 1, 1).to(self.dtype)
            z_MD = self.transformer(both, class_MD).flatten(0, 1).clone()
            x_NP, steps = noise.initial(k), plan.diffusion_steps[k]
            noise_TNP = noise.steps(k, steps)
            timesteps = diffusion_tables(steps, config.num_timesteps).timestep.flip(0).to(device)
            table_T8 = update_table(steps, config.num_timesteps, plan.temperatures[k]).to(device)
            level_M = torch.full((len(z_MD),), float(level), device=device)
            scale = torch.tensor(plan.guidance_scales[k], device=device)
            for t in range(steps):
                timestep_M = timesteps[t].expand(len(z_MD)).contiguous()
                # A copy, as a CUDA graph writes over its result when it is replayed.
                x_NP = self.step(
                    x_NP, z_MD, level_M, timestep_M, table_T8[t], noise_TNP[t], scale
                ).clone()
            x_BLP = x_NP.view(batch, config.num_tokens, -1)
            latent_BCHH = unpatchify(x_BLP, config.patch_size)
        return latent_BCHH
