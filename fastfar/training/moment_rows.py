"""What a moment head is trained on: sampling runs of its teacher, and their rows in files.

A row is a token of one outer step: the conditions z_c and z_u that the frozen model gives at the
input which that run had there, and the token x that the denoising MLP drew.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastfar._files import atomic_write
from fastfar.levels import patchify
from fastfar.model import FAR
from fastfar.noise import NoiseSource, seeded_noise
from fastfar.outer_step import Inputs
from fastfar.plan import SamplingPlan
from fastfar.sampling import outer_steps, sample_latents


@dataclass(frozen=True)
class Runs:
    """Sampling runs of B images.

    Attributes:
        labels_B: (B,) int64.
        order_BL: (B, L) int64 order of the tokens; None for a plan without masks.
        latent_SBCHH: (S, B, C, H, H) floating, the latent after each outer step.
    """

    labels_B: Tensor
    order_BL: Tensor | None
    latent_SBCHH: Tensor


def sampled_runs(
    model: FAR,
    plan: SamplingPlan,
    labels_B: Tensor,
    generator: torch.Generator | Sequence[torch.Generator] | int | None = None,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
) -> Runs:
    """Sample with `plan` and keep the latent after each outer step; see `sample_latents`."""
    config = model.config
    noise = seeded_noise(generator, len(labels_B), config.num_tokens, config.token_dim)
    kept: list[Tensor] = []

    def keep(step: int, latent_BCHH: Tensor) -> None:
        kept.append(latent_BCHH.cpu())

    sample_latents(model, labels_B, plan, noise, None, backend, dtype, keep)
    return Runs(labels_B, _order(plan, noise), torch.stack(kept))


def _order(plan: SamplingPlan, noise: NoiseSource) -> Tensor | None:
    return None if plan.mask_ratios is None else noise.order()


class Batch(NamedTuple):
    """R rows of each of S outer steps: conditions (S, R, D), tokens (S, R, P), float32."""

    z_c_SRD: Tensor
    z_u_SRD: Tensor
    x_SRP: Tensor


class MomentRows:
    """The rows of some runs: an .npy file, (S, N, 2 D + P) float16, that is mapped into memory.

    Args:
        path: the file.
        token_dim: P.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is damaged.
    """

    def __init__(self, path: str | os.PathLike[str], token_dim: int) -> None:
        self._rows_SNE: npt.NDArray[np.float16] = np.load(path, mmap_mode="r", allow_pickle=False)
        self.token_dim = token_dim

    @classmethod
    def write(
        cls,
        model: FAR,
        plan: SamplingPlan,
        runs: Runs,
        path: str | os.PathLike[str],
        backend: str = "auto",
        dtype: torch.dtype | None = None,
    ) -> MomentRows:
        """Compute the conditions of `runs` and write them with their tokens, atomically."""
        config, device = model.config, model.fake_latent.device
        inputs = Inputs.of(runs.labels_B, runs.order_BL, device)
        rows = len(runs.labels_B) * config.num_tokens
        rows_SNE = np.empty((len(plan), rows, 2 * config.width + config.token_dim), np.float16)
        with outer_steps(model, plan, backend, dtype) as step:
            latent_SBCHH = runs.latent_SBCHH.to(device, step.state_dtype)
            for k in range(len(plan)):
                z_MLD = step.condition(k, inputs, latent_SBCHH[max(k - 1, 0)])
                # Without guidance the unconditional half is the conditional one.
                z_MD = z_MLD.flatten(0, 1).float()
                x_NP = patchify(latent_SBCHH[k], config.patch_size).flatten(0, 1).float()
                row_NE = torch.cat([z_MD[:rows], z_MD[-rows:], x_NP], dim=1)
                rows_SNE[k] = row_NE.half().cpu().numpy()
        with atomic_write(path) as temporary, open(temporary, "wb") as stream:
            np.save(stream, rows_SNE, allow_pickle=False)
        return cls(path, config.token_dim)

    def __len__(self) -> int:
        """N."""
        return int(self._rows_SNE.shape[1])

    def take(self, step_M: npt.NDArray[np.int64], row_M: npt.NDArray[np.int64]) -> Tensor:
        """(M, 2 D + P) float16: one row each."""
        return torch.from_numpy(self._rows_SNE[step_M, row_M])


class MomentData:
    """Rows of several files as one, the last ones kept out for validation."""

    def __init__(self, parts: Sequence[MomentRows], steps: int, validation: float) -> None:
        if not parts:
            raise ValueError("a moment head needs rows to be trained on: give at least one file")
        self.parts, self.steps = parts, steps
        self.ends = np.cumsum([len(part) for part in parts])
        self.count = int(self.ends[-1])
        self.trained = self.count - max(1, round(self.count * validation))
        if self.trained < 1:
            raise ValueError(f"{self.count} rows are too few to train on")

    def batch(self, size: int, generator: np.random.Generator, kept_out: bool = False) -> Batch:
        """`size` random rows of each outer step."""
        low, high = (self.trained, self.count) if kept_out else (0, self.trained)
        row_M = generator.integers(low, high, self.steps * size)
        step_M = np.repeat(np.arange(self.steps), size)
        part_M = np.searchsorted(self.ends, row_M, side="right")
        width = self.parts[0]._rows_SNE.shape[-1]
        rows_ME = torch.empty(len(row_M), width, dtype=torch.float16)
        for i in np.unique(part_M):
            here = np.flatnonzero(part_M == i)
            start = self.ends[i] - len(self.parts[i])
            rows_ME[torch.from_numpy(here)] = self.parts[i].take(step_M[here], row_M[here] - start)
        numbers = self.parts[0].token_dim
        half = (width - numbers) // 2
        rows_SRE = rows_ME.float().view(self.steps, size, width)
        z_c_SRD, z_u_SRD = rows_SRE[..., :half], rows_SRE[..., half : 2 * half]
        return Batch(z_c_SRD, z_u_SRD, rows_SRE[..., 2 * half :])
