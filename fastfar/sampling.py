"""The outer loop: from the lowest frequency level to the sharp latent.

Source: FAR, arXiv 2503.05305, section 3.4, algorithm of the published code.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fastfar import backend as backends
from fastfar import graphs, reference
from fastfar._tables import fingerprint, finish
from fastfar.graphs import OnLevel
from fastfar.model import FAR
from fastfar.moments import MomentHead, prepared_moments
from fastfar.noise import CheckedNoise, NoiseSource, draws, seeded_noise
from fastfar.ops import use_backend
from fastfar.ops._folded_head import fold_head
from fastfar.outer_step import Inputs, OuterStep
from fastfar.plan import SamplingPlan
from fastfar.prepared import PreparedFAR, native_reason, prepare_native
from fastfar.rows import Rows

FOLDED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (torch.float64, *FOLDED_DTYPES)


def sample_latents(
    model: FAR,
    class_labels: Tensor | Sequence[int] | int,
    plan: SamplingPlan,
    noise: NoiseSource | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | int | None = None,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
    on_level: OnLevel | None = None,
    whole_levels: bool = True,
    moments: MomentHead | None = None,
) -> Tensor:
    """Sample one latent per class label.

    At outer step k: z = transformer(tokens_k, class); x ~ denoise(z, level_k); tokens_{k+1} =
    mask(low-pass(x, input level of step k + 1)). The result is the x of the last step.

    Back end "triton" on a CUDA device captures the run as a CUDA graph at the first call for a plan
    and a batch size, and replays it from then on: `fastfar.graphs` says when and how.

    Args:
        model: a FAR model.
        class_labels: (B,) whole numbers in 0..num_classes - 1.
        plan: levels, masks, guidance, temperature, diffusion steps.
        noise: source of every random number; None makes a `SeededNoise` from `generator`.
        generator: one torch.Generator, one per image, a seed, or None (PyTorch's own).
        backend: "auto", "reference", "torch", "native" or "triton".
        dtype: compute dtype; None is the back end's best, float32 is parity mode everywhere. The
            native back end has float32 and bfloat16; its activations are float32 in both.
        on_level: called as on_level(step, latent_BCHH) after each outer step (which is then a CUDA
            graph of its own, where there are graphs).
        whole_levels: False if `on_level` does not need whole latents: tokens that nothing depends
            on, because they are masked next, are then not computed but zero, as without `on_level`.
        moments: the moment head of this model, for a plan whose solvers ask for one
            (`fastfar.moments`).

    Returns:
        (B, C, H, H) float32 (float64 if that is the compute dtype), on the model's device.

    Raises:
        ValueError: a label out of range, an empty list, a plan beyond the model's levels, noise
            of another shape, a back end that is not available or does not take the model, an
            unusable dtype; a plan that needs a moment head where there is none, or another one.
        TypeError: labels or plan of the wrong type.
    """
    labels_B = check_labels(class_labels, model.config.num_classes)
    if not isinstance(plan, SamplingPlan):
        raise TypeError(f"plan must be a SamplingPlan, got {type(plan).__name__}")
    plan.check_fits(model.config.num_levels)
    moments = _check_moments(moments, plan, model)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}, got {dtype}")
    device = _device(model)
    graphs.refuse_inside_capture(device)
    name, dtype = _chosen(model, backend, dtype)
    shape = (len(labels_B), model.config.num_tokens, model.config.token_dim)
    noise = seeded_noise(generator, *shape) if noise is None else CheckedNoise(noise, *shape)
    # The compute dtype is `dtype`, whatever autocast would do around this call.
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        if name == "reference":
            copied, _ = _prepared(model, name, dtype)
            return _sample_reference(copied, labels_B.to(device), plan, noise, on_level, moments)
        with use_backend(name):
            # Triton's graphs and eager Triton, to the last bit, do the same products.
            rows: Rows = "fixed" if name == "triton" else "seen"
            if on_level is not None and whole_levels:
                rows = "all"
            if moments is not None:
                moments = prepared_moments(moments, name, dtype, device)
            step = OuterStep(*_prepared(model, name, dtype), plan, dtype, rows, moments)
            if name == "triton" and graphs.wanted(device):
                return graphs.sample(step, labels_B, noise, on_level)
            return _sample(step, labels_B, noise, on_level)


@contextmanager
def outer_steps(
    model: FAR, plan: SamplingPlan, backend: str = "auto", dtype: torch.dtype | None = None
) -> Iterator[OuterStep]:
    """The outer steps of `plan`, for what looks into a run; call them inside the block.

    model, plan, backend, dtype: see `sample_latents`. ValueError for backend "reference", whose
    loop is one piece.
    """
    device = _device(model)
    name, dtype = _chosen(model, backend, dtype)
    if name == "reference":
        raise ValueError("backend 'reference' has no outer steps of its own; use 'torch'")
    with torch.inference_mode(), torch.autocast(device.type, enabled=False), use_backend(name):
        yield OuterStep(*_prepared(model, name, dtype), plan, dtype, "all")


def check_labels(class_labels: Tensor | Sequence[int] | int, num_classes: int) -> Tensor:
    """(B,) int64 labels; TypeError or ValueError says what is wrong with them."""
    labels_B = torch.as_tensor(class_labels)
    if labels_B.numel() == 0:
        raise ValueError("class_labels is empty; give at least one class")
    if labels_B.is_floating_point() or labels_B.dtype is torch.bool or labels_B.is_complex():
        raise TypeError(f"class_labels must be whole numbers, got {labels_B.dtype}")
    labels_B = labels_B.long().reshape(-1) if labels_B.ndim < 2 else labels_B.long()
    if labels_B.ndim != 1:
        raise ValueError(f"class_labels must be one-dimensional, got {tuple(labels_B.shape)}")
    if int(labels_B.min()) < 0 or int(labels_B.max()) >= num_classes:
        raise ValueError(
            f"class labels must lie in 0..{num_classes - 1}, got {sorted(set(labels_B.tolist()))}"
        )
    return labels_B


def _sample(
    step: OuterStep, labels_B: Tensor, noise: NoiseSource, on_level: OnLevel | None
) -> Tensor:
    """The outer steps one after the other, each with noise that is drawn when it is needed."""
    plan, batch, device = step.plan, len(labels_B), _device(step.model)
    order_BL = None if plan.mask_ratios is None else noise.order()
    inputs = Inputs.of(labels_B, order_BL, device)
    dtype = step.state_dtype
    latent_BCHH = torch.zeros(step.latent_shape(batch), dtype=dtype, device=device)
    for k, (initial_NP, noise_TNP) in enumerate(draws(noise, plan.diffusion_steps)):
        initial_NP, noise_TNP = initial_NP.to(device, dtype), noise_TNP.to(device, dtype)
        latent_BCHH = step(k, inputs, latent_BCHH, initial_NP, noise_TNP)
        if on_level is not None:
            on_level(k, latent_BCHH)
    return latent_BCHH


def _sample_reference(
    model: FAR,
    labels_B: Tensor,
    plan: SamplingPlan,
    noise: NoiseSource,
    on_level: OnLevel | None,
    moments: MomentHead | None,
) -> Tensor:
    config = model.config
    return reference.sample_latents(
        model.state_dict(),
        labels_B,
        plan,
        noise,
        num_heads=config.num_heads,
        latent_size=config.latent_size,
        patch_size=config.patch_size,
        num_levels=config.num_levels,
        kind=config.filter,
        num_timesteps=config.num_timesteps,
        on_level=on_level,
        moments=None if moments is None else moments.moments,
    )


def _check_moments(
    moments: MomentHead | None, plan: SamplingPlan, model: FAR
) -> MomentHead | None:
    """The moment head if `plan` asks for one, else None; ValueError where it cannot be used."""
    if not any(solver.needs_moments for solver in plan.solvers):
        return None
    if moments is None:
        raise ValueError(
            "this plan needs a moment head (fastfar.moments), and there is none: load a model that "
            "has one, give moments=, or change the plan's solvers"
        )
    moments.check(plan, model.config)
    return moments


def _device(model: FAR) -> torch.device:
    return model.fake_latent.device


def _chosen(model: FAR, backend: str, dtype: torch.dtype | None) -> tuple[str, torch.dtype]:
    """The back end and compute dtype that the user's choice means for this model."""
    device = _device(model)
    name = backends.resolve(backend, device, dtype, native_reason(model.config))
    if isinstance(model, PreparedFAR):
        return name, _check_prepared(model, name, dtype)
    return name, backends.best_dtype(name, device) if dtype is None else dtype


def _check_prepared(model: PreparedFAR, name: str, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a model packed for the native back end; ValueError for anything else."""
    held = model.compute_dtype
    if name != "native" or dtype not in (None, held):
        raise ValueError(
            f"this model was packed for the native back end in {held}; it cannot be sampled on "
            f"back end {name!r} in {dtype or held}. Load it again without backend='native', or "
            "leave backend and dtype out"
        )
    return held


@dataclass(frozen=True)
class _Copy:
    """What `_prepared` keeps; `model` is None where the model itself is fit."""

    made_for: tuple[object, ...]
    model: FAR | None
    head: Mapping[str, Tensor]


_copies: weakref.WeakKeyDictionary[FAR, _Copy] = weakref.WeakKeyDictionary()  # one per model
_copying = threading.Lock()


def _prepared(
    model: FAR, backend: str, dtype: torch.dtype
) -> tuple[FAR, Mapping[str, Tensor]]:
    """The model as `backend` runs it in `dtype`, in eval mode, and its head as that takes it.

    The model itself if that is what it is. Else a copy, kept until the model is gone, its weights
    or its attention back end change, or another one is asked for.
    """
    same = all(parameter.dtype is dtype for parameter in model.parameters())
    fit = isinstance(model, PreparedFAR) or (backend != "native" and same and not model.training)
    if fit and backend != "triton":
        return model, model.head_weights
    weights = fingerprint(model.parameters())
    made_for = (backend, dtype, model.attention_backend, weights)
    with _copying:
        kept = _copies.get(model)
        if kept is None or kept.made_for != made_for:
            kept = None
            _copies.pop(model, None)  # free the old copy before the new one is made
            copied = model if fit else _copy(model, backend, dtype)
            head = copied.head_weights
            if backend == "triton" and dtype in FOLDED_DTYPES:
                head = fold_head(model.head_weights, dtype)  # as they are: rounded once
            finish(_device(model))  # other threads read them on streams of their own
            kept = _copies[model] = _Copy(made_for, None if fit else copied, head)
    return model if kept.model is None else kept.model, kept.head


def _copy(model: FAR, backend: str, dtype: torch.dtype) -> FAR:
    if backend == "native":
        return prepare_native(model, dtype)
    return copy.deepcopy(model).to(dtype).eval().requires_grad_(False)
