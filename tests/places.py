"""Where the tests under tests/gpu run: a device, a dtype, sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map

from fastfar import FARConfig

# Nothing is a multiple of anything: 9 tokens of 8 numbers, 3 buffer positions, width 24.
ODD = FARConfig(
    width=24,
    encoder_depth=1,
    decoder_depth=1,
    num_heads=3,
    head_depth=2,
    head_width=20,
    latent_channels=2,
    latent_size=6,
    patch_size=2,
    buffer_size=3,
    num_classes=5,
)
CONFIGS = {"odd": ODD, "far_base": FARConfig.preset("far_base")}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Place:
    """A device and a dtype. The interpreter has no bfloat16: its tl.dot of it is wrong."""

    device: torch.device
    dtype: torch.dtype

    @property
    def real(self) -> bool:
        """Whether it is a GPU."""
        return self.device.type == "cuda"

    def move(self, tree: Any) -> Any:
        """All tensors of a tree on the device."""
        return tree_map(lambda x: x.to(self.device) if isinstance(x, torch.Tensor) else x, tree)
