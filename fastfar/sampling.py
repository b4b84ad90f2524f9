"""The outer loop: from the lowest frequency level to the sharp latent.

Source: FAR, arXiv 2503.05305, section 3.4, algorithm of the published code.
"""

from __future__ import annotations

import copy
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
        dtype: compute dtype; None is the back end's best, float32 is parity mode everywhere.
        on_level: called as on_level(step, latent_BCHH) after each outer step.

    Returns:
        (B, C, H, H) float32 (float64 if that is the compute dtype), on the model's device.

    Raises:
        ValueError: a label out of range, an empty list, a plan beyond the model's levels, noise
            of another shape, a back end that is not available, an unusable dtype.
        TypeError: labels or plan of the wrong type.
    """
    labels_B = check_labels(class_labels, model.config.num_classes).to(_device(model))
    if not isinstance(plan, SamplingPlan):
        raise TypeError(f"plan must be a SamplingPlan, got {type(plan).__name__}")
    plan.check_fits(model.config.num_levels)
    name = backends.resolve(backend, labels_B.device)
    if dtype is None:
        dtype = backends.best_dtype(name, labels_B.device)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}, got {dtype}")
    shape = (len(labels_B), model.config.num_tokens, model.config.token_dim)
    noise = seeded_noise(generator, *shape) if noise is None else CheckedNoise(noise, *shape)
    model = _in_dtype(model, dtype)
    with torch.inference_mode():
        if name == "reference":
            return _sample_reference(model, labels_B, plan, noise, on_level)
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
    batch, device = len(labels_B), labels_B.device
    state_dtype = torch.promote_types(dtype, torch.float32)
    conditional_BD = model.class_embedding(labels_B)
    unconditional_BD = model.unconditional_embedding(batch)
    head = dict(model.head.named_parameters())
    order_BL = noise.order().to(device) if plan.mask_ratios is not None else None
    shape = (batch, config.latent_channels, config.latent_size, config.latent_size)
    latent_BCHH = torch.zeros(shape, dtype=state_dtype, device=device)

    for k, level in enumerate(plan.levels):
        mask_BL, num_kept = None, None
        if order_BL is not None:
            num_masked = plan.num_masked(k, config.num_tokens)
            num_kept = config.num_tokens - num_masked
            mask_BL = torch.zeros(order_BL.shape, dtype=torch.bool, device=device)
            mask_BL.scatter_(1, order_BL[:, :num_masked], True)
        input_level = 0 if k == 0 else plan.input_levels[k]
        level_B = labels_B.new_full((batch,), -1 if input_level is None else input_level)
        tokens_BLP = filter_mask_patchify(
            latent_BCHH,
            level_B,
            mask_BL,
            patch_size=config.patch_size,
            num_levels=config.num_levels,
            kind=config.filter,
        ).to(dtype)
        scale = plan.guidance_scales[k]
        if scale == 1.0:
            z_MLD = model(tokens_BLP, conditional_BD, mask_BL, num_kept)
        else:
            z_MLD = model(
                torch.cat([tokens_BLP, tokens_BLP]),
                torch.cat([conditional_BD, unconditional_BD]),
                None if mask_BL is None else torch.cat([mask_BL, mask_BL]),
                num_kept,
            )
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


# model -> (dtype, fingerprint of its weights, copy in that dtype); one copy per model is kept.
_copies: weakref.WeakKeyDictionary[FAR, tuple[torch.dtype, tuple[int, ...], FAR]] = (
    weakref.WeakKeyDictionary()
)


def _in_dtype(model: FAR, dtype: torch.dtype) -> FAR:
    """The model in eval mode and in `dtype`: itself if it is so already, else a kept copy."""
    same = all(parameter.dtype is dtype for parameter in model.parameters())
    if same and not model.training:
        return model
    # Tensors made in inference mode count no versions.
    fingerprint = tuple(
        p.data_ptr() + (0 if p.is_inference() else p._version) for p in model.parameters()
    )
    kept = _copies.get(model)
    if kept is not None and kept[:2] == (dtype, fingerprint):
        return kept[2]
    converted = copy.deepcopy(model).to(dtype).eval().requires_grad_(False)
    _copies[model] = (dtype, fingerprint, converted)
    return converted
