"""Launches that stand for all that a kernel is used for: FAR-H's sizes, unless said otherwise.

Each entry calls the launchers of kernels/gpu/<op>.py on fake CUDA tensors; the caller has entered
FakeTensorMode and `recording`. What they record is compiled (proof 2) and costed (proof 4).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

LAUNCHES: dict[str, Callable[[int, torch.dtype], None]] = {}
