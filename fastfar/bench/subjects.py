"""Everything that makes an image, behind one protocol, and how each is called and built.

A selector is MODEL[/FORM[/PLAN]]:

    far_huge                     a preset in the forms that make sense on the device, official plan
    far_huge/native/paper        one form, with the paper's T from 40 to 100
    far_huge/native/fast         the preset with few head calls: approximate
    demo/torch/T=8               the embedded checkpoint with another T; "official-mask" has masks
    var_d24, mar_huge/published  a baseline in both of its forms, or in one

Subjects of one family (all of one model) share weights, so they are built and dropped together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fastfar import backend as backends
from fastfar import baselines
from fastfar.bench import far
from fastfar.bench.baseline import BaselineSubject
from fastfar.bench.far import FARSubject
from fastfar.bench.gate import Gate
from fastfar.bench.probes import truth
from fastfar.bench.timing import now
from fastfar.config import PRESETS
from fastfar.kl_vae import KLVAE
from fastfar.model import FAR
from fastfar.plan import SamplingPlan, ramp
from fastfar.tokenizer import PixelTokenizer


class Subject(Protocol):
    """Something that makes images; what its row says of it, see `fastfar.bench.rows.Row`."""

    key: str
    title: str
    model: str
    form: str
    dtype: torch.dtype
    device: torch.device
    steps: int
    num_parameters: int
    random_weights: bool
    ways: str
    shape: str
    plan_name: str
    plan_mode: str
    extrapolation: str | None

    @property
    def mode(self) -> str:
        """Honesty mode."""

    @property
    def plan(self) -> dict[str, Any] | None:
        """As plain data."""

    def labels(self, batch: int) -> Tensor:
        """(B,) int64 classes to make images of."""

    def draw(self, batch: int) -> Any:
        """Source of the random numbers, drawn as the run asks for them."""

    def run(self, labels_B: Tensor, source: Any) -> Tensor:
        """Stage one: what `decode` takes."""

    def decode(self, tokens: Tensor) -> Tensor:
        """Stage two: (B, C, H, W) float32 in [0, 1]."""

    def check(self) -> Gate:
        """The correctness gate."""

    def reference_flops(self, batch: int) -> int:
        """Published arithmetic of a batch."""

    def executed_flops(self, batch: int) -> int | None:
        """What this form multiplies; None where that is not counted."""


def timed_run(subject: Subject, labels_B: Tensor, source: Any) -> tuple[Tensor, float]:
    """Tokens and the seconds of stage one, the device idle before and after."""
    if isinstance(subject, BaselineSubject) and subject.extrapolation is not None:
        return subject.timed_run(labels_B, source)
    start = now(subject.device)
    tokens = subject.run(labels_B, source)
    return tokens, now(subject.device) - start


def described(subject: Subject) -> dict[str, Any]:
    """The fields of a row that the subject itself has to say."""
    return {
        "subject": subject.key,
        "title": subject.title,
        "model": subject.model,
        "form": subject.form,
        "mode": subject.mode,
        "dtype": str(subject.dtype).removeprefix("torch."),
        "shape": subject.shape,
        "ways": subject.ways,
        "plan": subject.plan,
        "plan_name": subject.plan_name,
        "plan_mode": subject.plan_mode,
        "steps": subject.steps,
        "num_parameters": subject.num_parameters,
        "random_weights": subject.random_weights,
        "extrapolation": subject.extrapolation,
    }


@dataclass(frozen=True)
class Recipe:
    """A subject that is not built yet.

    Attributes:
        sketch: the same subject on the meta device: it says everything and computes nothing.
        build: makes it; takes a dictionary in which subjects of a family share their weights.
        family: name of what they share.
        reason: why it cannot run here; None if it can.
    """

    sketch: Subject
    build: Callable[[dict[str, Any]], Subject]
    family: str
    reason: str | None = None

    @property
    def key(self) -> str:
        """Of the subject."""
        return self.sketch.key


@dataclass(frozen=True)
class Choice:
    """What is asked of FAR besides model and form, by options or by a selector's last part."""

    checkpoint: str | None = None
    mode: str = "nomask"
    diffusion_steps: int | None = None
    head_depth: int | None = None
    guidance_scale: float | None = None
    dtype: torch.dtype | None = None
    timed_steps: int = field(default=8)  # of a baseline whose steps are extrapolated


def select(
    selectors: Sequence[str], device: torch.device | str, choice: Choice | None = None
) -> list[Recipe]:
    """Recipes of the selectors, in their order, each once.

    Raises:
        ValueError: an unknown model, form or plan; the message says what is allowed.
    """
    device, choice = torch.device(device), choice or Choice()
    found: dict[str, Recipe] = {}
    sketched: dict[str, far.Weights] = {}
    for selector in selectors:
        model, *rest = selector.split("/")
        if model in baselines.NAMES:
            recipes = _baseline_recipes(selector, model, rest, device, choice)
        elif model in PRESETS:
            if model not in sketched:
                sketched[model] = _sketched(None if model == "demo" else model, choice)
            recipes = _far_recipes(selector, sketched[model], model, rest, device, choice)
        else:
            allowed = ", ".join([*sorted(PRESETS), *baselines.NAMES])
            raise ValueError(f"subject {selector!r} is not known; models: {allowed}")
        for recipe in recipes:
            found.setdefault(recipe.key, recipe)
    return list(found.values())


def _form_of(selector: str, form: str, allowed: Sequence[str]) -> str:
    if form not in allowed:
        raise ValueError(f"{selector!r}: form {form!r} is not known; allowed: {', '.join(allowed)}")
    return form


# --- FAR -------------------------------------------------------------------------------------


def far_recipes(
    preset: str | None, forms: Sequence[str] | None, device: torch.device, choice: Choice
) -> list[Recipe]:
    """FAR in these forms (None: those that make sense on the device), baselines of it first.

    preset None is the checkpoint of the choice, None of both the embedded demo.
    """
    if unknown := [form for form in forms or () if form not in far.FORMS]:
        raise ValueError(f"--backends {unknown} not known; allowed: {', '.join(far.FORMS)}")
    chosen = forms or far.default_forms(device.type == "cuda")
    weights = _sketched(preset, choice)
    plan = _plan(weights, choice)
    return [
        _far_recipe(weights, form, plan, preset, device, choice)
        for form in far.FORMS
        if form in chosen
    ]


def _far_recipes(
    selector: str,
    weights: far.Weights,
    model: str,
    rest: list[str],
    device: torch.device,
    choice: Choice,
) -> list[Recipe]:
    preset = None if model == "demo" else model
    forms = [_form_of(selector, rest[0], far.FORMS)] if rest else None
    if len(rest) > 2:
        raise ValueError(f"{selector!r}: a selector is MODEL[/FORM[/PLAN]]")
    plan = _named_plan(selector, weights, rest[1]) if len(rest) == 2 else _plan(weights, choice)
    chosen = forms or [f for f in far.default_forms(device.type == "cuda")
                       if f != "reference" or preset is None]  # fmt: skip
    return [_far_recipe(weights, form, plan, preset, device, choice) for form in chosen]


def _plan(weights: far.Weights, choice: Choice) -> SamplingPlan:
    plan = weights.plan or weights.official(choice.mode)
    return plan.with_changes(
        diffusion_steps=choice.diffusion_steps, guidance_scale=choice.guidance_scale
    )


def _named_plan(selector: str, weights: far.Weights, name: str) -> SamplingPlan:
    base, _, masked = name.partition("-")
    kind = "mask" if masked == "mask" else "nomask"
    if masked in ("", "mask"):
        if base in ("official", "paper"):
            return weights.official(kind, base == "paper")
        if base == "fast":
            own = weights.plan if weights.plan is not None and not masked else None
            return SamplingPlan.fast(own or weights.official(kind))
        first, _, last = base.removeprefix("T=").partition("..")
        ends = [first, last or first]
        if base.startswith("T=") and all(t.isdecimal() and 1 <= int(t) <= 1000 for t in ends):
            plan = weights.plan if weights.plan is not None and not masked else None
            plan = plan or weights.official(kind)
            return plan.with_changes(diffusion_steps=ramp(int(ends[0]), int(ends[1]), len(plan)))
    raise ValueError(
        f"{selector!r}: plan {name!r} is not known; allowed: official, paper, fast, T=1 to T=1000, "
        "T=40..100 and the like, each also with -mask"
    )


def _sketched(preset: str | None, choice: Choice) -> far.Weights:
    """Weights without memory; a checkpoint's are read, as its sizes stand in it."""
    if preset is None:
        return far.load(None, choice.checkpoint)
    with torch.device("meta"):
        config = far.sized(preset, choice.head_depth)
        model = FAR(config)
        tokenizer = KLVAE() if config.latent_channels == 16 else PixelTokenizer(0.0, 1.0)
    return far.Weights(preset, model, tokenizer, random=True)


def _far_recipe(
    sketched: far.Weights,
    form: str,
    plan: SamplingPlan,
    preset: str | None,
    device: torch.device,
    choice: Choice,
) -> Recipe:
    dtype, reason = far_dtype(form, device, choice.dtype)
    family = f"{sketched.name} {choice.head_depth or ''}".strip()

    def build(shared: dict[str, Any]) -> FARSubject:
        if family not in shared:
            shared[family] = far.load(preset, choice.checkpoint, device, choice.head_depth)
        return FARSubject(shared[family], form, dtype, plan)

    return Recipe(FARSubject(sketched, form, dtype, plan), build, family, reason)


def far_dtype(
    form: str, device: torch.device, dtype: torch.dtype | None
) -> tuple[torch.dtype, str | None]:
    """The compute dtype of a form (None: its best), and why it cannot run here, or None."""
    on_gpu = device.type == "cuda"
    backend = {"eager": "triton", "compile": "torch", "autocast": "torch"}.get(form, form)
    reason = backends.backends()[backend]
    if backend == "triton" and not on_gpu:
        reason = "Triton kernels run on a GPU"
    if backend == "native" and on_gpu:
        reason = "native kernels run on a CPU"
    if form == "reference" or reason is not None:
        best = torch.float32
    elif form == "autocast":
        best = torch.bfloat16
    else:
        best = backends.best_dtype(backend, device)
    if dtype is not None and form != "reference":
        best = dtype
    if form == "autocast" and best not in far.HALF:
        reason = f"autocast needs a 16-bit dtype, not {best}"
    return best, reason


# --- baselines -------------------------------------------------------------------------------


def _baseline_recipes(
    selector: str, name: str, rest: list[str], device: torch.device, choice: Choice
) -> list[Recipe]:
    if len(rest) > 1:
        raise ValueError(f"{selector!r}: a baseline's selector is MODEL[/FORM]; it has one plan")
    forms = [_form_of(selector, rest[0], baselines.FORMS)] if rest else list(baselines.FORMS)
    return [_baseline_recipe(name, form, device, choice) for form in forms]


def _baseline_recipe(name: str, form: str, device: torch.device, choice: Choice) -> Recipe:
    def build(shared: dict[str, Any]) -> BaselineSubject:
        if shared.get("gate", True):
            truth(name, device)  # before, as it takes the memory that the forms will fill
        made = baselines.create(name, form, device=device, dtype=choice.dtype)
        return BaselineSubject(made, choice.timed_steps, choice.dtype is not None)

    meta = baselines.create(name, form, device="meta", dtype=choice.dtype)
    sketch = BaselineSubject(meta, choice.timed_steps, choice.dtype is not None)
    return Recipe(sketch, build, name)
