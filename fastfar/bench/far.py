"""FAR as a subject: one model and plan, in each of the forms that `fastfar bench` compares.

reference    the published loop in float32, all of its arithmetic, one step at a time
autocast     the same with 16-bit autocast: FAR as published
torch        fastfar's exact algebra on PyTorch's operators
compile      the published model and loop, its two networks and the update by torch.compile
native       fastfar's C++ kernels (CPU)
eager        fastfar's Triton kernels, launched one by one
triton       the same as a CUDA graph of the whole image
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastfar import graphs, reference
from fastfar._weights import skeleton
from fastfar.bench.compiled import Compiled
from fastfar.bench.gate import FACTOR, FLOORS, Gate, distance
from fastfar.bench.plans import first_steps, plan_mode, plan_name, steps_text
from fastfar.bench.stages import reference_ranges
from fastfar.checkpoint import load_pretrained
from fastfar.config import FARConfig
from fastfar.costs import counts
from fastfar.decoding import decode_latents
from fastfar.kl_vae import KLVAE
from fastfar.model import FAR
from fastfar.moments import MomentHead
from fastfar.noise import NoiseSource, seeded_noise
from fastfar.plan import SamplingPlan
from fastfar.prepared import prepare_native
from fastfar.profiling import annotate
from fastfar.rows import Rows
from fastfar.sampling import sample_latents
from fastfar.tokenizer import PixelTokenizer

FORMS = ("reference", "autocast", "torch", "compile", "native", "eager", "triton")
HALF = (torch.bfloat16, torch.float16)
PUBLISHED = ("reference", "autocast")
COPIES = ("torch", "compile", "native")  # forms that hold a copy of the weights of their own
TITLES = {"far_base": "FAR-B", "far_large": "FAR-L", "far_huge": "FAR-H"}
WAYS = {
    "reference": "published loop in float32, one diffusion step at a time, eager",
    "autocast": "published loop, float32 weights under autocast, eager",
    "torch": "exact algebra on PyTorch's operators, weights in the compute dtype",
    "compile": "published networks and loop, weights in the compute dtype, torch.compile",
    "native": "C++ kernels, packed weights, float32 activations",
    "eager": "Triton kernels, launched one by one",
    "triton": "Triton kernels, the whole image one CUDA graph",
}
SEED = 0
FLOAT64_LIMIT = 50_000_000  # parameters of a model whose truth is computed in float64
# A large model's gate runs the first outer steps. With T = 20 and random weights rounding decides
# on which bound of x0 a token lies: three seeds of FAR-H on an H100 gave errors of 0.007 to 0.019,
# with T = 100 all gave 0.007.
GATE_OUTER_STEPS, GATE_DIFFUSION_STEPS = 2, 100

Tokenizer = PixelTokenizer | KLVAE


def sized(preset: str, head_depth: int | None = None) -> FARConfig:
    """The configuration of a preset, with another depth of the head if one is given."""
    config = FARConfig.preset(preset)
    if head_depth is None:
        return config
    return FARConfig.from_dict({**config.to_dict(), "head_depth": head_depth})


def random_tokenizer(config: FARConfig) -> Tokenizer:
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
class Weights:
    """A model with its decoder, shared by the subjects that are made of it.

    Attributes:
        name: preset or checkpoint.
        model: float32, in eval mode.
        tokenizer: of its latents.
        plan: a checkpoint's own plan, None for a preset.
        random: whether the weights were drawn.
        moments: a checkpoint's moment head, if it has one.
    """

    name: str
    model: FAR
    tokenizer: Tokenizer
    plan: SamplingPlan | None = None
    random: bool = False
    moments: MomentHead | None = None
    _made: dict[tuple[str, torch.dtype], Any] = field(default_factory=dict)
    _truths: dict[SamplingPlan, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _allowed: dict[tuple[SamplingPlan, torch.dtype], float] = field(default_factory=dict)

    @property
    def config(self) -> FARConfig:
        """Of the model."""
        return self.model.config

    def __post_init__(self) -> None:
        self.device = self.model.fake_latent.device

    def forget(self) -> None:
        """Drop the float32 model: forms that hold a copy of their own, and ran once, go on."""
        self.model = self.model.to("meta")

    @property
    def title(self) -> str:
        """For tables."""
        return TITLES.get(self.name, self.name)

    def official(self, mode: str = "nomask", paper: bool = False) -> SamplingPlan:
        """The published plan, or the paper's T; random weights bound x0 to (-3, 3).

        Without bounds random weights let tokens grow without limit; time does not depend on it.
        """
        plan = SamplingPlan.paper(mode) if paper else SamplingPlan.official(mode)
        return plan.with_changes(x0_range=(-3.0, 3.0)) if self.random else plan

    def network(self, form: str, dtype: torch.dtype) -> Any:
        """What a form samples with, made once: packed, converted, compiled or as it is."""
        key = (form, dtype)
        if key not in self._made:
            self._made[key] = self._network(form, dtype)
        return self._made[key]

    def decoder(self, form: str, dtype: torch.dtype) -> Tokenizer:
        """The tokenizer of a form: decoding keeps one converted copy of each."""
        if form in PUBLISHED or not isinstance(self.tokenizer, KLVAE):
            return self.tokenizer
        key = ("decode " + form, dtype)
        if key not in self._made:
            self._made[key] = copy.deepcopy(self.tokenizer)
        made: Tokenizer = self._made[key]
        return made

    def _network(self, form: str, dtype: torch.dtype) -> Any:
        if form in PUBLISHED:
            # Leaves that ask for a gradient: autocast keeps the copies that it makes of these.
            return {
                key: nn.Parameter(p.detach(), requires_grad=form == "autocast")
                for key, p in self.model.named_parameters()
            }
        if form == "native":
            return prepare_native(self.model, dtype)
        if form in ("torch", "compile"):
            return _converted(self.model, dtype)
        return self.model  # sampling keeps the copy that the Triton kernels read

    def truth(self, plan: SamplingPlan) -> tuple[Tensor, Tensor]:
        """Latent and image of one label: of small models in float64, else in float32."""
        if plan not in self._truths:
            exact = torch.float64 if self.small else torch.float32
            labels_B, noise = labels_of(1, self.config.num_classes), seeded(self, 1)
            options: Any = {"backend": "reference", "dtype": exact, "moments": self.moments}
            latent = sample_latents(self.model, labels_B, plan, noise, **options)
            image = pixels(decode_latents(self.tokenizer, latent.float(), "reference"))
            self._truths[plan] = (latent, image)
        return self._truths[plan]

    @property
    def small(self) -> bool:
        """Whether the gate can afford float64 and the whole plan."""
        return sum(p.numel() for p in self.model.parameters()) <= FLOAT64_LIMIT

    def allowed(self, plan: SamplingPlan, dtype: torch.dtype) -> float:
        """Error of the published loop in a dtype (16 bits: under autocast) to the truth."""
        key = (plan, dtype)
        if key not in self._allowed:
            form = "autocast" if dtype in HALF else "reference"
            self._allowed[key] = FARSubject(self, form, dtype, plan).error(plan)
        return self._allowed[key]


def load(
    preset: str | None,
    checkpoint: str | None = None,
    device: torch.device | str = "cpu",
    head_depth: int | None = None,
) -> Weights:
    """A checkpoint (None: the embedded demo), or a preset with random weights."""
    if preset is None:
        parts = load_pretrained(checkpoint or "demo", dtype=torch.float32)
        tokenizer = parts.tokenizer or PixelTokenizer(0.0, 1.0)
        name = checkpoint or "demo"
        made = Weights(name, parts.model, tokenizer, parts.plan, moments=parts.moments)
    else:
        config = sized(preset, head_depth)
        model = random_model(config)
        made = Weights(preset, model, random_tokenizer(config), random=True)
    if isinstance(made.tokenizer, KLVAE):
        made.tokenizer = made.tokenizer.to(device)
    made.model = made.model.to(device).eval().requires_grad_(False)
    made.device = made.model.fake_latent.device
    return made


def labels_of(batch: int, num_classes: int) -> Tensor:
    """Classes 0, 1, 2, ..."""
    return torch.arange(batch) % num_classes


def seeded(weights: Weights, batch: int) -> NoiseSource:
    """The noise of a run, a function of `SEED` alone; drawn on the host as the run asks for it."""
    return seeded_noise(SEED, batch, weights.config.num_tokens, weights.config.token_dim)


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


def pixels(images: Tensor) -> Tensor:
    """Images in [-1, 1] as float32 in [0, 1]."""
    return images.float().add(1.0).div(2.0).clamp(0.0, 1.0)


class FARSubject:
    """FAR in one form, dtype and plan. See `fastfar.bench.subjects.Subject`."""

    extrapolation: str | None = None

    def __init__(
        self, weights: Weights, form: str, dtype: torch.dtype, plan: SamplingPlan
    ) -> None:
        if form == "compile" and (plan.mask_ratios is not None or plan.is_approximate):
            raise ValueError("the form compile knows the published sampler without masks alone")
        self.weights, self.form, self.dtype, self.sampling_plan = weights, form, dtype, plan
        self.model, self.device = weights.name, weights.device
        self.plan_name, self.plan_mode = plan_name(plan), plan_mode(plan)
        short = str(dtype).removeprefix("torch.")
        self.key = f"{self.model}/{form}/{short}/{self.plan_name}"
        as_called = "as published" if form == "autocast" else form
        self.title = f"{weights.title} {as_called}, {steps_text(plan)}"
        self.random_weights = weights.random
        self.num_parameters = sum(p.numel() for p in weights.model.parameters())
        self.steps = len(plan)
        self.ways = f"{WAYS[form]}; products in {short}"
        config = weights.config
        self.shape = f"{config.num_tokens} tokens of {config.token_dim}"
        self._compiled: Compiled | None = None

    @property
    def mode(self) -> str:
        """Honesty mode: "parity" in float32, "exact" where products are rounded to 16 bits.

        A plan with another sampler than the published one is "approximate" in any dtype.
        """
        if self.sampling_plan.is_approximate:
            return "approximate"
        if self.form == "autocast":
            return "as published"
        return "exact" if self.dtype in HALF else "parity"

    @property
    def plan(self) -> dict[str, Any]:
        """As plain data."""
        return self.sampling_plan.to_dict()

    def labels(self, batch: int) -> Tensor:
        """(B,) classes that are timed."""
        return labels_of(batch, self.weights.config.num_classes)

    def draw(self, batch: int) -> NoiseSource:
        """A seeded source; drawing is part of the run, as it is for a user."""
        return seeded(self.weights, batch)

    def run(self, labels_B: Tensor, source: NoiseSource) -> Tensor:
        """Latents of the labels."""
        return self._run(labels_B, source, self.sampling_plan)

    def decode(self, tokens: Tensor) -> Tensor:
        """(B, C, H, W) images in [0, 1]; the published way under autocast, too."""
        weights, form = self.weights, self.form
        if form == "autocast":
            with (
                annotate("decode"),
                torch.no_grad(),
                torch.autocast(self.device.type, self.dtype),
            ):
                return pixels(weights.tokenizer.to_images(tokens))
        backend = {"eager": "triton", "compile": "torch"}.get(form, form)
        tokenizer = weights.decoder(form, self.dtype)
        return pixels(decode_latents(tokenizer, tokens, backend, self.dtype))

    def check(self) -> Gate:
        """Small models: the whole plan against float64; large ones a shortened one, float32.

        Allowed is `FACTOR` times the error of the published loop in the same dtype (16 bits:
        float32 weights under autocast), plus a floor.
        """
        plan, note = self.sampling_plan, "whole plan against float64"
        if not self.weights.small:
            plan = first_steps(plan, GATE_OUTER_STEPS).with_changes(
                diffusion_steps=GATE_DIFFUSION_STEPS
            )
            note = (
                f"{GATE_OUTER_STEPS} outer steps of {GATE_DIFFUSION_STEPS} diffusion steps "
                "against float32"
            )
        limit = FACTOR * self.weights.allowed(plan, self.dtype) + FLOORS[self.dtype]
        same = self.form == ("autocast" if self.dtype in HALF else "reference")
        error = self.weights.allowed(plan, self.dtype) if same else self.error(plan)
        return Gate(error, limit, f"latent and image of one label, {note}")

    def error(self, plan: SamplingPlan) -> float:
        """Of latent or image, the larger one, to the truth of a plan."""
        truth = self.weights.truth(plan)
        labels_B, noise = self.labels(1), seeded(self.weights, 1)
        latent = self._run(labels_B, noise, plan)
        return max(map(distance, (latent, self.decode(latent)), truth))

    def reference_flops(self, batch: int) -> int:
        """Published arithmetic, without masks."""
        return batch * counts.reference_image_flops(
            self.weights.config, self.sampling_plan, self._vae
        )

    def executed_flops(self, batch: int) -> int | None:
        """What this form multiplies for a batch; None for the published way with masks."""
        return sum(self.stage_flops(batch).values()) or None

    def stage_flops(self, batch: int) -> dict[str, int]:
        """`executed_flops` of "transformer", "head" and "decode"; empty where not counted.

        With masks the mean over the orders of the tokens.
        """
        plan, config = self.sampling_plan, self.weights.config
        rows: Rows = "fixed" if self.form in ("eager", "triton") else "seen"
        work = counts.native_work(config, plan, self._vae, rows)
        found = {name: batch * stage.flops for name, stage in work.items()}
        if self.form in ("native", "eager", "triton"):
            return found
        if self.form == "torch":
            loops = [loop for k in range(len(plan)) for loop in counts.loops_of(config, plan, k)]
            return found | {"head": batch * sum(loop.hoisted_flops() for loop in loops)}
        if plan.mask_ratios is not None:
            return {}
        transformer = len(plan) * counts.transformer_flops(config, 2)
        heads = [counts.Head.of(config, config.num_tokens, 2, t) for t in plan.diffusion_steps]
        head = sum(each.published_flops() for each in heads)
        return found | {"transformer": batch * transformer, "head": batch * head}

    @property
    def _vae(self) -> KLVAE | None:
        return self.weights.tokenizer if isinstance(self.weights.tokenizer, KLVAE) else None

    def _run(self, labels_B: Tensor, noise: NoiseSource, plan: SamplingPlan) -> Tensor:
        form, dtype, network = self.form, self.dtype, self.weights.network(self.form, self.dtype)
        if form in PUBLISHED:
            noise = _OnDevice(noise, self.device)
            return self._published(network, labels_B, noise, plan)
        if form == "compile":
            noise = _OnDevice(noise, self.device)
            if self._compiled is None:
                self._compiled = Compiled(network, dtype)
            return self._compiled(labels_B, noise, plan)
        backend = "triton" if form == "eager" else form
        with graphs.disabled() if form == "eager" else nullcontext():
            options: Any = {"backend": backend, "dtype": dtype, "moments": self.weights.moments}
            return sample_latents(network, labels_B, plan, noise, **options)

    def _published(
        self,
        parameters: dict[str, nn.Parameter],
        labels_B: Tensor,
        noise: NoiseSource,
        plan: SamplingPlan,
    ) -> Tensor:
        """The published loop. Parameters, not a state dict: autocast keeps copies of leaves."""
        config, device = self.weights.config, self.device
        half = self.form == "autocast"
        autocast = torch.autocast(device.type, self.dtype if half else None, half)
        with reference_ranges(), torch.no_grad(), autocast:
            latent: Tensor = reference.sample_latents(
                parameters,
                labels_B.to(device),
                plan,
                noise,
                num_heads=config.num_heads,
                latent_size=config.latent_size,
                patch_size=config.patch_size,
                num_levels=config.num_levels,
                kind=config.filter,
                num_timesteps=config.num_timesteps,
                moments=None if self.weights.moments is None else self.weights.moments.moments,
            )
        return latent.float()


@torch.no_grad()
def _converted(model: FAR, dtype: torch.dtype) -> FAR:
    """A copy in a dtype, parameter by parameter: no second float32 copy on the way."""
    with skeleton():
        copied = FAR(model.config).eval()
    state = {key: p.detach().to(dtype, copy=True) for key, p in model.state_dict().items()}
    copied.load_state_dict(state, assign=True)
    copied.set_attention_backend(model.attention_backend)
    return copied.requires_grad_(False)


def default_forms(on_gpu: bool) -> tuple[str, ...]:
    """The forms that make sense on a device, slowest first."""
    if on_gpu:
        return ("autocast", "torch", "compile", "eager", "triton")
    return ("reference", "autocast", "torch", "native")
