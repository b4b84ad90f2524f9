"""The training loss of FAR and the random draws that it consumes.

Source: FAR, arXiv 2503.05305, sections 3.3 (diffusion loss, frequency-aware training loss) and
3.4 (masking); published code of FAR for the "official" mask rule and the batch multiplier.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastfar.config import FARConfig
from fastfar.levels import check_levels, patchify
from fastfar.model import FAR
from fastfar.ops import add_noise, filter_mask_patchify, hybrid_loss
from fastfar.profiling import annotate

MASK_RULES = ("paper", "official")
LEVEL_WEIGHTS = ("sine",)
TARGETS = ("clean", "next_level")


@dataclass(frozen=True)
class TrainingDraws:
    """Every random number of one evaluation of the loss.

    Attributes:
        level: (B,) int64, or (1,) for one level for the whole batch.
        timestep: (M * B * L,) int64; rows with the batch multiplier M outermost.
        noise: (M * B * L, P).
        mask: (B, L), 1 or True where a token is masked; None trains without masks.
        dropped: (B,) bool, images whose label is replaced by "no class"; None drops none.
        target_level: (B,) int64, level to which the target is low-passed; None is the clean latent.
    """

    level: Tensor
    timestep: Tensor
    noise: Tensor
    mask: Tensor | None = None
    dropped: Tensor | None = None
    target_level: Tensor | None = None


def mask_ratio(level_B: Tensor, num_levels: int, rule: str, uniform_B: Tensor) -> Tensor:
    """Share of masked tokens per image, of numbers drawn uniformly in [0, 1).

    "paper": uniform in [r_i, 1], r_i falling linearly from 0.7 at level 0 to 0 at the top level.
    "official": normal(1, 0.25) truncated to [0.7 i / K, 1], the published code's rule, which
    rises with the level.
    """
    fraction_B = level_B.float() / num_levels
    if rule == "paper":
        lowest_B = 0.7 * (1.0 - level_B.float() / max(num_levels - 1, 1)).clamp(min=0.0)
        return lowest_B + (1.0 - lowest_B) * uniform_B
    if rule == "official":
        # Inverse of the normal distribution function, between its values at the two bounds.
        low_B = torch.special.ndtr((0.7 * fraction_B - 1.0) / 0.25)
        ratio_B: Tensor = 1.0 + 0.25 * torch.special.ndtri(low_B + (0.5 - low_B) * uniform_B)
        return ratio_B.clamp(0.0, 1.0)
    raise ValueError(f"mask rule must be one of {MASK_RULES} or None, got {rule!r}")


def sample_draws(
    config: FARConfig,
    batch: int,
    *,
    mask_rule: str | None = "paper",
    batch_multiplier: int = 4,
    label_dropout: float = 0.0,
    level_per_image: bool = True,
    levels: Sequence[int] | None = None,
    target: str = "clean",
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    level_generator: torch.Generator | None = None,
) -> TrainingDraws:
    """Draw levels, timesteps, noise, masks and dropped labels for one batch.

    Args:
        config: the model's sizes.
        batch: B.
        mask_rule: "paper", "official" or None (no masks).
        batch_multiplier: M, times that each token's target is used with fresh t and noise.
        label_dropout: probability of training an image without its label.
        level_per_image: one level per image; False is the published one level per batch.
        levels: the ascending levels to draw from, those of a sampling plan; None is 0..K - 1.
        target: "clean" for the clean latent at every level (the paper's direct modelling of it,
            as published), "next_level" for the latent at the next of `levels` (K after the last).
        generator: CPU generator; None is PyTorch's own. One for each image makes the draws of an
            image the same alone and in any batch.
        level_generator: of the level, where it is one for the batch; None is `generator`.

    Raises:
        ValueError: unknown mask rule or target, levels that are not ascending within 0..K - 1, or
            not one generator per image.
    """
    ladder = check_ladder(levels, config.num_levels)
    if target not in TARGETS:
        raise ValueError(f"target must be one of {TARGETS}, got {target!r}")
    numbers = _numbers(config, batch, batch_multiplier, generator)
    level_u_B, mask_u_B, label_u_B = numbers.uniform_BU[:, :3].unbind(dim=1)
    if not level_per_image:
        one = level_u_B[:1] if level_generator is None else torch.rand(1, generator=level_generator)
        level_u_B = one.expand(batch)
    place_B = (level_u_B * len(ladder)).long().clamp(max=len(ladder) - 1)
    level_B = torch.tensor(ladder)[place_B]
    next_level_B = torch.tensor((*ladder[1:], config.num_levels))[place_B]
    mask_BL = None
    if mask_rule is not None:
        ratio_B = mask_ratio(level_B, config.num_levels, mask_rule, mask_u_B)
        count_B = torch.ceil(ratio_B * config.num_tokens)
        rank_BL = numbers.uniform_BU[:, 3:].argsort(dim=1).argsort(dim=1)
        mask_BL = rank_BL < count_B[:, None]
    return TrainingDraws(
        level=level_B,
        timestep=numbers.timestep_BML.transpose(0, 1).flatten(),
        noise=numbers.noise_BMLP.transpose(0, 1).flatten(0, 2),
        mask=mask_BL,
        dropped=label_u_B < label_dropout if label_dropout > 0 else None,
        target_level=next_level_B if target == "next_level" else None,
    )


class _Numbers(NamedTuple):
    """What is random of some images: uniform in [0, 1) (for level, mask ratio, label and the order
    of the tokens), timesteps, normal noise."""

    uniform_BU: Tensor
    timestep_BML: Tensor
    noise_BMLP: Tensor


def _numbers(
    config: FARConfig,
    batch: int,
    multiplier: int,
    generator: torch.Generator | Sequence[torch.Generator] | None,
) -> _Numbers:
    length = config.num_tokens
    numbers = _Numbers(
        torch.empty(batch, 3 + length),
        torch.empty(batch, multiplier, length, dtype=torch.int64),
        torch.empty(batch, multiplier, length, config.token_dim),
    )
    parts = [numbers]
    if isinstance(generator, Sequence):
        if len(generator) != batch:
            raise ValueError(f"give one generator for each of {batch} images, got {len(generator)}")
        parts = [_Numbers(*rows) for rows in zip(*numbers, strict=True)]
    each = generator if isinstance(generator, Sequence) else [generator]
    for part, one in zip(parts, each, strict=True):
        part.uniform_BU.uniform_(generator=one)
        part.timestep_BML.random_(config.num_timesteps, generator=one)
        part.noise_BMLP.normal_(generator=one)
    return numbers


def check_ladder(levels: Sequence[int] | None, num_levels: int) -> tuple[int, ...]:
    """Levels to train, 0..K - 1 for None; ValueError unless they ascend within that range."""
    if levels is None:
        return tuple(range(num_levels))
    ladder = tuple(levels)
    if not ladder or list(ladder) != sorted(set(ladder) & set(range(num_levels))):
        raise ValueError(
            f"levels must be ascending whole numbers in 0..{num_levels - 1}, none twice, got "
            f"{list(ladder)}"
        )
    return ladder


def level_weights(
    level_B: Tensor, num_levels: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """w_i = 1 + sin(pi/2 * i / K): sharper levels count more (the paper's frequency-aware loss)."""
    return 1.0 + torch.sin(math.pi / 2 * level_B.to(dtype) / num_levels)


def _check(config: FARConfig, latents: Tensor, class_labels: Tensor, draws: TrainingDraws) -> None:
    expected = (config.latent_channels, config.latent_size, config.latent_size)
    if latents.ndim != 4 or tuple(latents.shape[1:]) != expected:
        raise ValueError(
            f"latents must be (B, {', '.join(map(str, expected))}) for this model, "
            f"got {tuple(latents.shape)}"
        )
    batch, length = len(latents), config.num_tokens
    if class_labels.shape != (batch,):
        raise ValueError(
            f"class_labels must be ({batch},) like the latents, got {tuple(class_labels.shape)}"
        )
    rows = len(draws.timestep)
    if rows == 0 or rows % (batch * length):
        raise ValueError(
            f"draws.timestep has {rows} rows; give a multiple of B * L = {batch * length}"
        )
    if draws.noise.shape != (rows, config.token_dim):
        raise ValueError(
            f"draws.noise must be ({rows}, {config.token_dim}), got {tuple(draws.noise.shape)}"
        )
    if draws.mask is not None and draws.mask.shape != (batch, length):
        raise ValueError(
            f"draws.mask must be ({batch}, {length}), got {tuple(draws.mask.shape)}"
        )
    for name in ("level", "target_level"):
        level = getattr(draws, name)
        if level is None:
            continue
        if len(level) not in (1, batch):
            raise ValueError(f"draws.{name} must hold 1 or {batch} levels, got {len(level)}")
        check_levels(level, config.num_levels)


def _prepare(
    config: FARConfig, latents: Tensor, class_labels: Tensor, draws: TrainingDraws
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What does not depend on the model: levels, mask, tokens, timesteps, noise, targets, x_t."""
    _check(config, latents, class_labels, draws)
    batch, device = len(latents), latents.device
    level_B = draws.level.to(device).expand(batch)
    mask_BL = None if draws.mask is None else draws.mask.to(device)
    low_passed = partial(
        filter_mask_patchify,
        latents,
        patch_size=config.patch_size,
        num_levels=config.num_levels,
        kind=config.filter,
    )
    tokens_BLP = low_passed(level_B, mask_BL)
    timestep_N, noise_NP = draws.timestep.to(device), draws.noise.to(latents)
    if draws.target_level is None:
        target_RP = patchify(latents, config.patch_size).flatten(0, 1)
    else:
        target_RP = low_passed(draws.target_level.to(device).expand(batch)).flatten(0, 1)
    noised_NP = add_noise(target_RP, noise_NP, timestep_N, num_timesteps=config.num_timesteps)
    return level_B, mask_BL, tokens_BLP, timestep_N, noise_NP, target_RP, noised_NP


def loss_per_image(
    model: FAR, latents: Tensor, class_labels: Tensor, draws: TrainingDraws
) -> Tensor:
    """(B,) mean of the hybrid loss over all tokens of each image, masked or not, and all draws."""
    config = model.config
    level_B, mask_BL, tokens_BLP, timestep_N, noise_NP, target_RP, noised_NP = _prepare(
        config, latents, class_labels, draws
    )
    batch = len(latents)
    dropped_B = None if draws.dropped is None else draws.dropped.to(latents.device)
    class_BD = model.class_embedding(class_labels, dropped_B)
    z_BLD = model(tokens_BLP, class_BD, mask_BL)

    multiplier = len(timestep_N) // (batch * config.num_tokens)
    z_ND = z_BLD.flatten(0, 1).repeat(multiplier, 1)
    level_N = level_B.repeat_interleave(config.num_tokens).repeat(multiplier)
    with annotate("head"):
        output_N2P = model.head(noised_NP, timestep_N, z_ND, level_N)
    loss_N = hybrid_loss(
        output_N2P,
        target_RP,
        noise_NP,
        noised_NP,
        timestep_N,
        num_timesteps=config.num_timesteps,
    )
    return loss_N.view(multiplier, batch, -1).mean(dim=(0, 2))


def diffusion_loss(
    model: FAR,
    latents: Tensor,
    class_labels: Tensor,
    draws: TrainingDraws | None = None,
    level_weight: str | None = None,
) -> Tensor:
    """Training loss of one batch: mean_b w(level_b) * mean over tokens of the hybrid loss.

    The input is the masked, low-passed latent; the target is the clean latent (or that of
    `draws.target_level`) at every token, masked or not, each repeated with fresh t and noise for
    one condition.

    Args:
        model: in train mode it drops features (and, with draws=None, a tenth of the labels).
        latents: (B, C, H, H) clean, scaled latents.
        class_labels: (B,) int64.
        draws: injected random numbers; None draws them by `sample_draws` (paper's mask rule,
            one level per image, batch multiplier 4).
        level_weight: None for 1, or "sine" for w_i = 1 + sin(pi/2 * i / K).

    Returns:
        scalar, float32 (float64 for float64 latents).

    Raises:
        ValueError: shapes do not fit the model, a level is out of range, unknown level_weight.

    torch.compile(diffusion_loss, fullgraph=True) works where `draws` are given (`sample_draws`
    makes them); the backward is compiled with it. Levels are then not checked.

    Source: FAR, arXiv 2503.05305, section 3.3.
    """
    if level_weight is not None and level_weight not in LEVEL_WEIGHTS:
        raise ValueError(
            f"level_weight must be None or one of {LEVEL_WEIGHTS}, got {level_weight!r}"
        )
    if draws is None:
        dropout = 0.1 if model.training else 0.0
        draws = sample_draws(model.config, len(latents), label_dropout=dropout)
    loss_B = loss_per_image(model, latents, class_labels, draws)
    return mean_loss(loss_B, draws.level, model.config.num_levels, level_weight)


def mean_loss(
    loss_B: Tensor, level_B: Tensor, num_levels: int, level_weight: str | None
) -> Tensor:
    """mean_b w(level_b) * loss_b, with w = 1 or, for "sine", `level_weights`."""
    if level_weight == "sine":
        loss_B = loss_B * level_weights(level_B, num_levels, loss_B.dtype).to(loss_B)
    return loss_B.mean()
