"""The scale of latents: where KL-16's 0.2325 comes from.

A diffusion model expects data of unit variance. The published models multiply the tokenizer's
latents by 1 / std, std taken over all numbers of all latents of the training set about their common
mean, which itself is not subtracted (as latent diffusion does).

Legend: B pictures, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastfar.data.batches import read
from fastfar.data.images import Examples, in_batches
from fastfar.data.latents import LatentCache, encode
from fastfar.tokenizer import KLVAE, PixelTokenizer


@dataclass(frozen=True)
class LatentStatistics:
    """Of `images` pictures.

    Attributes:
        images: pictures measured.
        mean, std: of all numbers.
        scale: 1 / std.
        scale_error: standard error of the scale. The numbers of one picture depend on each other,
            so a picture counts as one observation.
        channel_means, channel_stds: per channel.
    """

    images: int
    mean: float
    std: float
    scale: float
    scale_error: float
    channel_means: tuple[float, ...]
    channel_stds: tuple[float, ...]


def measure_statistics(
    data: Examples,
    tokenizer: PixelTokenizer | KLVAE | None = None,
    *,
    images: int | None = None,
    batch_size: int = 32,
    workers: int = 0,
    device: torch.device | str = "cpu",
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> LatentStatistics:
    """Statistics of the unscaled latents, or, of pictures without a tokenizer, of the pixels.

    With posterior mean m and deviation s of every number, E z^2 = m^2 + s^2: the variance is that
    of draws from the posterior, with nothing drawn.

    Args:
        data: pictures, or a latent cache, which has its own tokenizer.
        tokenizer: of pictures; None measures pixels in [-1, 1]. It is moved to the device.
        images: how many, at random; None takes all.
        batch_size, workers: pictures at a time, and processes that read ahead.
        device: where the tokenizer runs.
        seed: decides which pictures.
        progress: told the number of pictures after every batch.

    Raises:
        ValueError: fewer than two pictures, or a tokenizer for what are latents already.
    """
    if tokenizer is not None and data.tokenizer is not None:
        raise ValueError("the data are latents already: measure them without a tokenizer")
    count = len(data) if images is None else min(images, len(data))
    if count < 2:
        raise ValueError(f"statistics need at least two pictures, got {count}")
    if isinstance(tokenizer, KLVAE):
        tokenizer = tokenizer.to(device)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(data), generator=generator)[:count].sort().values
    plan = in_batches(rows, batch_size)
    pairs: Iterable[tuple[Tensor, Tensor | None]] = (
        (data.posterior(rows_B) for rows_B in plan)
        if isinstance(data, LatentCache)
        else _encoded(data, plan, tokenizer, workers, device)
    )
    firsts, seconds = [], []
    for mean_BChw, std_BChw in pairs:
        z_BCN = mean_BChw.double().flatten(2)
        s_BCN = torch.zeros(()) if std_BChw is None else std_BChw.double().flatten(2)
        firsts.append(z_BCN.mean(-1).cpu())
        seconds.append((z_BCN.square() + s_BCN.square()).mean(-1).cpu())
        if progress is not None:
            progress(len(z_BCN))
    return _summary(torch.cat(firsts), torch.cat(seconds))


def _encoded(
    data: Examples,
    plan: Sequence[Tensor],
    tokenizer: PixelTokenizer | KLVAE | None,
    workers: int,
    device: torch.device | str,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    for images_BCHW, _ in read(data, plan, workers):
        images_BCHW = images_BCHW.to(device)
        yield (images_BCHW, None) if tokenizer is None else encode(tokenizer, images_BCHW)


def _summary(first_BC: Tensor, second_BC: Tensor) -> LatentStatistics:
    """From every picture's mean of z and of z^2 per channel, float64 (B, C).

    Standard error by the delete-nothing form of the jackknife, the influence function: picture b
    moves the variance by u_b = (q_b - q) - 2 m (m_b - m), and d(scale) = -d(variance) / (2 std^3).
    """
    count = len(first_BC)
    mean, square = first_BC.mean(), second_BC.mean()
    variance = square - mean.square()
    std = variance.sqrt()
    influence_B = (second_BC.mean(1) - square) - 2 * mean * (first_BC.mean(1) - mean)
    error = influence_B.std() / math.sqrt(count) / (2 * std**3)
    channel_mean_C = first_BC.mean(0)
    channel_std_C = (second_BC.mean(0) - channel_mean_C.square()).sqrt()
    return LatentStatistics(
        count,
        float(mean),
        float(std),
        float(1 / std),
        float(error),
        tuple(channel_mean_C.tolist()),
        tuple(channel_std_C.tolist()),
    )
