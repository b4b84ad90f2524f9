"""The models that FAR is compared with: VAR, MAR and LlamaGen, written after their papers.

Two forms of each: "published" runs as the published repository runs it, slow ways included;
"well_run" is what a good engineer makes of it without writing kernels. Both compute one function.

    baseline = create("var_d24", "well_run")
    images = baseline.generate(torch.tensor([207]))    # (1, 3, 256, 256) in [0, 1]

Names are imported when they are first used, so that listing the baselines does not wait for
PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastfar.baselines._baseline import Baseline, create

__all__ = ["FORMS", "NAMES", "Baseline", "create"]

NAMES = (
    "var_d16",
    "var_d20",
    "var_d24",
    "var_d30",
    "mar_base",
    "mar_large",
    "mar_huge",
    "llamagen_b",
    "llamagen_l",
    "llamagen_xl",
)
FORMS = ("published", "well_run")

if not TYPE_CHECKING:  # with a module __getattr__, type checkers would accept any name

    def __getattr__(name: str) -> Any:
        if name in ("Baseline", "create"):
            return getattr(importlib.import_module("fastfar.baselines._baseline"), name)
        raise AttributeError(f"module 'fastfar.baselines' has no attribute {name!r}")
