"""Triton's interpreter where there is no GPU. Imported before anything that may import Triton."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
