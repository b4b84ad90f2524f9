"""What the prepared forms of the denoising MLP share: named tensors, and their time embedding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfar._tables import finish
from fastfar.diffusion import device_timesteps, timestep_embedding

TIME_LAYERS = ("time_embed.mlp.0", "time_embed.mlp.2")  # held in float32, as published


class HeadWeights(Mapping[str, Tensor]):
    """Parameters of one denoising MLP as a back end reads them.

    Attributes:
        compute_dtype: of the products.
        width, depth: w and the number of blocks.
    """

    def __init__(self, tensors: dict[str, Tensor], compute_dtype: torch.dtype, depth: int) -> None:
        self._tensors = tensors
        self._times: dict[tuple[int, ...], Tensor] = {}
        self.compute_dtype = compute_dtype
        self.width = len(tensors[f"{TIME_LAYERS[1]}.bias"])
        self.depth = depth

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def time_embedding(self, timesteps: tuple[int, ...]) -> Tensor:
        """(T, w) float32 of these timesteps, in their order."""
        if timesteps not in self._times:
            device = self[f"{TIME_LAYERS[0]}.weight"].device
            with torch.autocast(device.type, enabled=False):
                self._times[timesteps] = self._time_embedding(timesteps)
            finish(device)  # for threads that read it on streams of their own
        return self._times[timesteps]

    def _time_embedding(self, timesteps: tuple[int, ...]) -> Tensor:
        first, second = ((self[f"{n}.weight"], self[f"{n}.bias"]) for n in TIME_LAYERS)
        timestep_T = device_timesteps(timesteps, first[0].device, torch.float32)
        hidden = F.linear(timestep_embedding(timestep_T, first[0].shape[1]), *first)
        return F.linear(F.silu(hidden), *second).contiguous()
