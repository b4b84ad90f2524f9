"""What VAR, MAR and LlamaGen have in common here: one interface, and how weights come to them.

A model file of this folder (`var.py`, `mar.py`, `llamagen.py`) holds the modules, whose keys are
the published ones, a subclass of `Baseline`, and `build(name, settings)`, which `create` calls.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastfar._weights import Source, check_fit, fill, open_weights, skeleton
from fastfar.baselines import FORMS, NAMES
from fastfar.profiling import annotate

M = TypeVar("M", bound=nn.Module)
Rule = Callable[[str, tuple[int, ...]], "tuple[float, float] | None"]

PARTS = ("model", "tokenizer")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUM_CLASSES = 1000
IMAGE_SIZE = 256


@dataclass(frozen=True)
class Settings:
    """The checked arguments of `create`, for `build(name, settings)` of a model file.

    Attributes:
        form: "published" or "well_run".
        device: where the weights are and the work is done; "meta" computes shapes only.
        dtype: of the computation; None leaves it to the form (`compute_dtype`).
        weights: {"model": source, "tokenizer": source}, or None for random ones.
        seed: of the random weights.
        compile: torch.compile: True, False, or None for where it helps.
    """

    form: str = "published"
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype | None = None
    weights: Mapping[str, Source] | None = None
    seed: int = 0
    compile: bool | None = None

    def compute_dtype(self, published_on_gpu: torch.dtype) -> torch.dtype:
        """The dtype asked for; None: the published one on a GPU in that form, else bfloat16."""
        if self.dtype is not None:
            return self.dtype
        on_gpu = self.device.type == "cuda" and self.form == "published"
        return published_on_gpu if on_gpu else torch.bfloat16


class Baseline(ABC):
    """A model that makes 256x256 images of ImageNet classes, in one of its two forms.

    Attributes:
        name, form, device: as given to `create`.
        dtype: of the computation: under autocast in the published form of VAR and MAR, of weights
            and activations elsewhere; float32 is the parity mode, without autocast.
        title: for tables, such as "VAR-d24".
        num_parameters: transformer and head, without the tokenizer.
        steps: outer autoregressive steps.
        guidance_scale: the published default of classifier-free guidance.
        random_weights: True where no checkpoint was given.
        ways: one sentence on how this form runs: weights, autocast, attention, compile.
        extrapolates: True if `tokens` can run a subset of its steps (`timed_steps`).
    """

    extrapolates: bool = False

    def __init__(
        self,
        name: str,
        settings: Settings,
        *,
        title: str,
        dtype: torch.dtype,
        steps: int,
        guidance_scale: float,
        num_parameters: int,
        ways: str,
    ) -> None:
        self.name = name
        self.form = settings.form
        self.device = settings.device
        self.random_weights = settings.weights is None
        self.title = title
        self.dtype = dtype
        self.steps = steps
        self.guidance_scale = guidance_scale
        self.num_parameters = num_parameters
        self.ways = ways

    @torch.inference_mode()
    def tokens(
        self,
        labels_B: Tensor,
        *,
        generator: torch.Generator | None = None,
        noise: Any = None,
        guidance_scale: float | None = None,
        greedy: bool = False,
        timed_steps: Sequence[int] | None = None,
    ) -> Tensor:
        """Stage one: what the tokenizer decodes. MAR: latents, VAR: f_hat, LlamaGen: codes.

        Args:
            labels_B: (B,) whole numbers, ImageNet classes 0..999.
            generator: source of the random draws, on the device of the model; None is PyTorch's.
            noise: the draws themselves, in the layout that the model's class states.
            guidance_scale: None is the published default.
            greedy: take the likeliest token everywhere (not for MAR, whose tokens are continuous).
            timed_steps: run only these outer steps; the others fill in random tokens without
                computing. Only where `extrapolates`; `step_weights` says how to scale the time.

        Raises:
            ValueError, TypeError: labels that are no classes, or an option that this model lacks.
        """
        labels_B = self._checked(labels_B)
        if timed_steps is not None and not self.extrapolates:
            raise ValueError(
                f"{self.title} always runs all of its {self.steps} steps; leave timed_steps out"
            )
        return self._tokens(
            labels_B,
            generator=generator,
            noise=noise,
            guidance_scale=self.guidance_scale if guidance_scale is None else guidance_scale,
            greedy=greedy,
            timed_steps=timed_steps,
        )

    @torch.inference_mode()
    def decode(self, tokens: Tensor) -> Tensor:
        """Stage two: (B, 3, 256, 256) float32 images in [0, 1] of what `tokens` returned."""
        with annotate("decode"):
            return self._decode(tokens)

    def generate(self, labels_B: Tensor, **options: Any) -> Tensor:
        """decode(tokens(labels_B, **options))."""
        return self.decode(self.tokens(labels_B, **options))

    def step_weights(self, timed_steps: Sequence[int]) -> tuple[float, ...]:
        """How many of all `steps` each of `timed_steps` stands for; they sum to `steps`."""
        raise ValueError(f"{self.title} runs all of its steps, so none stands for others")

    def autocast(self) -> AbstractContextManager[Any]:
        """Autocast in `dtype`; nothing in float32, and none on "meta", where it is not known."""
        if self.dtype == torch.float32 or self.device.type == "meta":
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    @abstractmethod
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
        """`tokens` with everything checked and filled in; labels are int64 on the device."""

    @abstractmethod
    def _decode(self, tokens: Tensor) -> Tensor:
        """`decode`."""

    def _checked(self, labels_B: Tensor) -> Tensor:
        if not isinstance(labels_B, Tensor) or labels_B.dtype not in (torch.int64, torch.int32):
            kind = labels_B.dtype if isinstance(labels_B, Tensor) else type(labels_B).__name__
            raise TypeError(f"labels must be an int64 tensor of classes, got {kind}")
        if labels_B.dim() != 1 or not len(labels_B):
            raise ValueError(f"labels must have shape (B,), B >= 1, got {tuple(labels_B.shape)}")
        # Labels on a GPU are not read: that would wait for it.
        if labels_B.device.type == "cpu":
            low, high = int(labels_B.min()), int(labels_B.max())
            if low < 0 or high >= NUM_CLASSES:
                raise ValueError(
                    f"labels must be in 0..{NUM_CLASSES - 1} (ImageNet), got {low}..{high}"
                )
        return labels_B.to(self.device, torch.int64)


def create(
    name: str,
    form: str = "published",
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    weights: Mapping[str, Source] | None = None,
    seed: int = 0,
    compile: bool | None = None,
) -> Baseline:
    """A baseline, ready to run.

    Args:
        name: one of `NAMES`.
        form: "published" or "well_run".
        device: "cpu", "cuda", or "meta" to count operations without memory.
        dtype: of the computation; None is how that form is run: 16 bits. float32 is parity mode.
        weights: {"model": source, "tokenizer": source}; a source is a path (.pth, .pt, .ckpt,
            .safetensors) or a state dict in the published layout, read without running code from
            it. None draws random ones, of a trained model's scale, in place.
        seed: of the random weights; both forms draw the same ones.
        compile: torch.compile in the well run form; None is where it helps.

    Raises:
        FileNotFoundError, TypeError, ValueError: an argument that is not one of these, or weights
            that do not fit; the message says what is allowed.
    """
    if name not in NAMES:
        raise ValueError(f"unknown baseline {name!r}; known are {', '.join(NAMES)}")
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r} of {name}; known are {', '.join(FORMS)}")
    if dtype is not None and dtype not in DTYPES:
        known = ", ".join(str(known) for known in DTYPES)
        raise ValueError(f"dtype must be None or one of {known}, got {dtype}")
    if compile and form == "published":
        raise ValueError("the published form runs without torch.compile; use form='well_run'")
    if weights is not None:
        if not isinstance(weights, Mapping):
            raise TypeError(f"weights must be a mapping or None, got {type(weights).__name__}")
        if set(weights) != set(PARTS):
            raise ValueError(
                f"weights must be {{'model': source, 'tokenizer': source}}, got {sorted(weights)}"
            )
    settings = Settings(form, torch.device(device), dtype, weights, seed, compile)
    family = importlib.import_module(f"fastfar.baselines.{name.split('_')[0]}")
    baseline: Baseline = family.build(name, settings)
    return baseline


def make(
    construct: Callable[[], M],
    settings: Settings,
    part: str,
    dtype: torch.dtype,
    *,
    rule: Rule | None = None,
    constants: Mapping[str, Tensor] | None = None,
    ignored: Sequence[str] = (),
) -> M:
    """The module `construct()` on the device in `dtype`, with the weights of `part` or random ones.

    Args:
        construct: builds the module; it is called where tensors have no memory.
        part: "model" or "tokenizer".
        rule: (key, shape) -> (mean, std) of a random weight, or None for the default: matrices and
            kernels 1 / sqrt(fan in) around 0, other weights 1, biases 0.02 around 0.
        constants: keys of the published file whose values follow from the sizes, with the values;
            a file is checked for them but they are not read.
        ignored: prefixes of published keys that `construct()` has no use for (an encoder).

    Memory: the module, and at the peak one parameter in float32 or 1/8 of the source.
    """
    constants = constants or {}
    with skeleton():
        module = construct()
    source = None if settings.weights is None else settings.weights[part]
    if source is not None:
        weights = open_weights(source)
        for prefix in ignored:
            weights = weights.without(prefix)
        numbers = {key: kind for key, kind in weights.dtypes.items() if key not in constants}
        check_fit(module, dataclasses.replace(weights, dtypes=numbers), type(module).__name__)
        _assign(module, constants, torch.device("cpu"))
        for key in constants:
            weights = weights.without(key)
        fill(module, weights, dtype).to(settings.device)
    else:
        module.to(dtype)
        if settings.device.type != "meta":
            module.to_empty(device=settings.device)
            _assign(module, constants, settings.device)
            _draw(module, settings.seed, rule, set(constants))
    return module.eval().requires_grad_(False)


def num_parameters(module: nn.Module) -> int:
    """Numbers that are learned."""
    return sum(parameter.numel() for parameter in module.parameters())


def _assign(module: nn.Module, constants: Mapping[str, Tensor], device: torch.device) -> None:
    values = {key: value.to(device) for key, value in constants.items()}
    module.load_state_dict(values, strict=False, assign=True)


@torch.no_grad()
def _draw(module: nn.Module, seed: int, rule: Rule | None, kept: set[str]) -> None:
    """Random values for every tensor but `kept`, each from its key and the seed alone.

    Drawn in float32 and rounded, so that the forms hold the same weights in their dtypes.
    """
    for key, tensor in module.state_dict().items():
        if key in kept:
            continue
        shape = tuple(tensor.shape)
        mean, std = (rule(key, shape) if rule else None) or _default_rule(key, shape)
        if std == 0:
            tensor.fill_(mean)
            continue
        generator = torch.Generator(tensor.device)
        generator.manual_seed(zlib.crc32(f"{seed} {key}".encode()))
        values = torch.empty(shape, device=tensor.device)
        tensor.copy_(values.normal_(mean, std, generator=generator))


def _default_rule(key: str, shape: tuple[int, ...]) -> tuple[float, float]:
    if len(shape) >= 2:
        return 0.0, 1 / math.sqrt(math.prod(shape[1:]))
    return (1.0, 0.0) if key.endswith("weight") else (0.0, 0.02)
