"""One case per op: what it is called with inside a model, and what that costs at least.

Every size comes from a `FARConfig`. FLOPs are those of matrix products, two per multiply-add, and
are told twice: `flops` for the arithmetic as published, `executed_flops` for what an implementation
has to do (work that it hoists or skips is not counted). `bytes_moved` reads every input and writes
the output once. M = 2 N rows or images stand for the two halves of guidance.

This folder is `fastfar.bench.cases`; import it by that name, also in a checkout.
"""

from __future__ import annotations

from fastfar.bench.cases import autoencoder, head, latents, transformer
from fastfar.bench.cases._case import Arguments, Case, as_float
from fastfar.bench.cases.head import STEPS, head_inputs

__all__ = ["CASES", "PRESETS", "STEPS", "Arguments", "Case", "as_float", "head_inputs"]

PRESETS = ("demo", "far_base")

CASES: dict[str, Case] = {
    case.name: case
    for module in (transformer, head, autoencoder, latents)
    for case in module.CASES
}
