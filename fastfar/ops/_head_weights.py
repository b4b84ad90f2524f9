"""What the prepared forms of the denoising MLP share: named tensors, and their time embedding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfar._tables import finish
from fastfar.diffusion import diffusion_tables, timestep_embedding

TIME_LAYERS = ("time_embed.mlp.0", "time_embed.mlp.2")  # held in float32, as published


class HeadWeights(Mapping[str, Tensor]):
    """Parameters of one denoising MLP as a back end reads them.

    Attributes:
        compute_dtype: of the products.
        width, depth: w and the number of blocks.
    """

    def __init__(self, tensors: dict[str, Tensor], compute_dtype: torch.dtype, depth: int) -> None:
        self._tensors = tensors
        self._times: dict[tuple[int, int], Tensor] = {}
        self.compute_dtype = compute_dtype
        self.width = len(tensors[f"{TIME_LAYERS[1]}.bias"])
        self.depth = depth

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def time_embedding(self, steps: int, num_timesteps: int) -> Tensor:
        """(T, w) float32 of the respaced timesteps, in the order of sampling (most noise first)."""
        key = (steps, num_timesteps)
        if key not in self._times:
            device = self[f"{TIME_LAYERS[0]}.weight"].device
            with torch.autocast(device.type, enabled=False):
                self._times[key] = self._time_embedding(steps, num_timesteps)
            finish(device)  # for threads that read it on streams of their own
        return self._times[key]

    def _time_embedding(self, steps: int, num_timesteps: int) -> Tensor:
        first, second = ((self[f"{n}.weight"], self[f"{n}.bias"]) for n in TIME_LAYERS)
        timesteps = diffusion_tables(steps, num_timesteps).timestep.flip(0).to(first[0].device)
        hidden = F.linear(timestep_embedding(timesteps, first[0].shape[1]), *first)
        return F.linear(F.silu(hidden), *second).contiguous()
