"""The outer loop: from the lowest frequency level to the sharp latent.

Source: FAR, arXiv 2503.05305, section 3.4, algorithm of the published code.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastfar import backend as backends
from fastfar import reference
from fastfar.levels import unpatchify
from fastfar.model import FAR
from fastfar.noise import CheckedNoise, NoiseSource, seeded_noise
from fastfar.ops import denoise_loop, filter_mask_patchify, use_backend
from fastfar.plan import SamplingPlan
from fastfar.prepared import PreparedFAR, native_reason, prepare_native

OnLevel = Callable[[int, Tensor], object]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def sample_latents(
    model: FAR,
    class_labels: Tensor | Sequence[int] | int,
    plan: SamplingPlan,
    noise: NoiseSource | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | int | None = None,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
    on_level: OnLevel | None = None,
) -> Tensor:
    """Sample one latent per class label.

    At outer step k: z = transformer(tokens_k, class); x ~ denoise(z, level_k); tokens_{k+1} =
    mask(low-pass(x, input level of step k + 1)). The result is the x of the last step.

    Args:
        model: a FAR model.
        class_labels: (B,) whole numbers in 0..num_classes - 1.
        plan: levels, masks, guidance, temperature, diffusion steps.
        noise: source of every random number; None makes a `SeededNoise` from `generator`.
        generator: one torch.Generator, one per image, a seed, or None (PyTorch's own).
        backend: "auto", "reference", "torch", "native" or "triton".
        dtype: compute dtype; None is the back end's best, float32 is parity mode everywhere. The
            native back end has float32 and bfloat16; its activations are float32 in both.
        on_level: called as on_level(step, latent_BCHH) after each outer step.

    Returns:
        (B, C, H, H) float32 (float64 if that is the compute dtype), on the model's device.

    Raises:
        ValueError: a label out of range, an empty list, a plan beyond the model's levels, noise
            of another shape, a back end that is not available or does not take the model, an
            unusable dtype.
        TypeError: labels or plan of the wrong type.
    """
    labels_B = check_labels(class_labels, model.config.num_classes)
    if not isinstance(plan, SamplingPlan):
        raise TypeError(f"plan must be a SamplingPlan, got {type(plan).__name__}")
    plan.check_fits(model.config.num_levels)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}, got {dtype}")
    device = _device(model)
    name = backends.resolve(backend, device, dtype, native_reason(model.config))
    if isinstance(model, PreparedFAR):
        dtype = _check_prepared(model, name, dtype)
    elif dtype is None:
        dtype = backends.best_dtype(name, device)
    shape = (len(labels_B), model.config.num_tokens, model.config.token_dim)
    noise = seeded_noise(generator, *shape) if noise is None else CheckedNoise(noise, *shape)
    model = _prepared(model, name, dtype)
    with torch.inference_mode():
        if name == "reference":
            return _sample_reference(model, labels_B.to(device), plan, noise, on_level)
        with use_backend(name):
            return _sample(model, labels_B, plan, noise, dtype, on_level)


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
    model: FAR,
    labels_B: Tensor,
    plan: SamplingPlan,
    noise: NoiseSource,
    dtype: torch.dtype,
    on_level: OnLevel | None,
) -> Tensor:
    config = model.config
    batch, device = len(labels_B), _device(model)
    state_dtype = torch.promote_types(dtype, torch.float32)
    token_dtype = torch.float32 if isinstance(model, PreparedFAR) else dtype
    classes_C, class_of_B = torch.unique(labels_B, return_inverse=True)
    class_CD = model.class_embedding(classes_C.to(device))
    class_of_B = class_of_B.to(device)
    head = model.head_weights
    order_BL = noise.order().to(device) if plan.mask_ratios is not None else None
    shape = (batch, config.latent_channels, config.latent_size, config.latent_size)
    latent_BCHH = torch.zeros(shape, dtype=state_dtype, device=device)

    for k, level in enumerate(plan.levels):
        scale = plan.guidance_scales[k]
        mask_BL, num_kept = None, None
        if order_BL is not None:
            num_masked = plan.num_masked(k, config.num_tokens)
            num_kept = config.num_tokens - num_masked
            mask_BL = torch.zeros(order_BL.shape, dtype=torch.bool, device=device)
            mask_BL.scatter_(1, order_BL[:, :num_masked], True)
        if k == 0:
            guided = scale != 1.0
            z_MLD = _first_condition(model, class_CD, class_of_B, guided, mask_BL, token_dtype)
        else:
            input_level = plan.input_levels[k]
            tokens_BLP = filter_mask_patchify(
                latent_BCHH,
                class_of_B.new_full((batch,), -1 if input_level is None else input_level),
                mask_BL,
                patch_size=config.patch_size,
                num_levels=config.num_levels,
                kind=config.filter,
            ).to(token_dtype)
            class_BD = class_CD[class_of_B]
            if scale != 1.0:
                tokens_BLP = tokens_BLP.repeat(2, 1, 1)
                class_BD = torch.cat([class_BD, model.unconditional_embedding(batch)])
                mask_BL = None if mask_BL is None else mask_BL.repeat(2, 1)
            z_MLD = model(tokens_BLP, class_BD, mask_BL, num_kept)
        x_NP = denoise_loop(
            head,
            z_MLD.flatten(0, 1),
            level,
            noise.initial(k).to(device, state_dtype),
            noise.steps(k, plan.diffusion_steps[k]).to(device, state_dtype),
            guidance_scale=scale,
            temperature=plan.temperatures[k],
            x0_range=plan.x0_range,
            num_timesteps=config.num_timesteps,
        )
        latent_BCHH = unpatchify(x_NP.view(batch, config.num_tokens, -1), config.patch_size)
        if on_level is not None:
            on_level(k, latent_BCHH)
    return latent_BCHH


def _first_condition(
    model: FAR,
    class_CD: Tensor,
    class_of_B: Tensor,
    guided: bool,
    mask_BL: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """z of outer step 0, where all tokens are zero, or all masked: a function of the class alone.

    So the transformer sees each class once, however many images of it there are, and "no class"
    once. Returns (B, L, D), or (2 B, L, D) with the unconditional half last.
    """
    if guided:
        class_CD = torch.cat([class_CD, model.unconditional_embedding(1)])
    count, tokens = len(class_CD), model.config.num_tokens
    zeros_CLP = torch.zeros(
        count, tokens, model.config.token_dim, dtype=dtype, device=class_CD.device
    )
    if mask_BL is None:
        z_CLD: Tensor = model(zeros_CLP, class_CD)
    else:
        z_CLD = model(zeros_CLP, class_CD, mask_BL[:1].expand(count, -1), 0)
    row_M = class_of_B
    if guided:
        row_M = torch.cat([class_of_B, torch.full_like(class_of_B, count - 1)])
    return z_CLD[row_M]


def _sample_reference(
    model: FAR,
    labels_B: Tensor,
    plan: SamplingPlan,
    noise: NoiseSource,
    on_level: OnLevel | None,
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
    )


def _device(model: FAR) -> torch.device:
    return model.fake_latent.device


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


# model -> (back end, dtype, fingerprint of its weights, copy made for them); one copy is kept.
_copies: weakref.WeakKeyDictionary[FAR, tuple[str, torch.dtype, tuple[int, ...], FAR]] = (
    weakref.WeakKeyDictionary()
)
_copying = threading.Lock()


def _prepared(model: FAR, backend: str, dtype: torch.dtype) -> FAR:
    """The model as `backend` runs it in `dtype`, in eval mode: itself if that is what it is.

    Else a copy, kept until the model is gone, its weights change or another one is asked for.
    """
    if isinstance(model, PreparedFAR):
        return model
    same = all(parameter.dtype is dtype for parameter in model.parameters())
    if backend != "native" and same and not model.training:
        return model
    # Tensors made in inference mode count no versions.
    fingerprint = tuple(
        p.data_ptr() + (0 if p.is_inference() else p._version) for p in model.parameters()
    )
    with _copying:
        kept = _copies.get(model)
        if kept is not None and kept[:3] == (backend, dtype, fingerprint):
            return kept[3]
        _copies.pop(model, None)  # free the old copy before the new one is made
        kept = None
        if backend == "native":
            copied: FAR = prepare_native(model, dtype)
        else:
            copied = copy.deepcopy(model).to(dtype).eval().requires_grad_(False)
        _copies[model] = (backend, dtype, fingerprint, copied)
        return copied
