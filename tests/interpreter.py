"""Triton's interpreter where there is no GPU. Imported before anything that may import Triton."""

from __future__ import annotations

import os

import numpy
import pytest
import torch
from packaging.version import Version

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def need() -> None:
    """Skip what runs kernels on CPU tensors where that is not possible; for tests and modules."""
    # A bare folder of that name has no version.
    triton = pytest.importorskip("triton", minversion="3.2")
    reason = None
    old = Version(triton.__version__) < Version("3.7")
    if os.environ.get("TRITON_INTERPRET") != "1":
        reason = "there is a GPU: Triton's interpreter is off, `make test-gpu` runs the kernels"
    elif old and Version(numpy.__version__) >= Version("2.4"):
        reason = f"Triton {triton.__version__}'s interpreter does not run with NumPy 2.4: update it"
    if reason is not None:
        pytest.skip(reason, allow_module_level=True)
