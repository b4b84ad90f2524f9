"""fastfar: frequency autoregressive image generation, as fast as the machine allows.

Names are imported when they are first used (PEP 562), so that `import fastfar` and
`fastfar --help` do not wait for PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastfar._version import __version__

if TYPE_CHECKING:
    from fastfar.checkpoint import load_official
    from fastfar.config import FARConfig
    from fastfar.model import FAR
    from fastfar.noise import SeededNoise, TensorNoise
    from fastfar.pipeline import FARPipeline
    from fastfar.plan import SamplingPlan
    from fastfar.sampling import sample_latents
    from fastfar.solver import Solver
    from fastfar.tokenizer import KLVAE, PixelTokenizer
    from fastfar.training.loss import TrainingDraws, diffusion_loss

__all__ = [
    "FAR",
    "KLVAE",
    "FARConfig",
    "FARPipeline",
    "PixelTokenizer",
    "SamplingPlan",
    "SeededNoise",
    "Solver",
    "TensorNoise",
    "TrainingDraws",
    "__version__",
    "diffusion_loss",
    "load_official",
    "sample_latents",
]

_MODULES = {
    "FAR": "fastfar.model",
    "FARConfig": "fastfar.config",
    "FARPipeline": "fastfar.pipeline",
    "KLVAE": "fastfar.tokenizer",
    "PixelTokenizer": "fastfar.tokenizer",
    "SamplingPlan": "fastfar.plan",
    "SeededNoise": "fastfar.noise",
    "Solver": "fastfar.solver",
    "TensorNoise": "fastfar.noise",
    "TrainingDraws": "fastfar.training.loss",
    "diffusion_loss": "fastfar.training.loss",
    "load_official": "fastfar.checkpoint",
    "sample_latents": "fastfar.sampling",
}

if not TYPE_CHECKING:  # with a module __getattr__, type checkers would accept any name

    def __getattr__(name: str) -> Any:
        """A public name, or a submodule, at its first use."""
        if name in _MODULES:
            value = getattr(importlib.import_module(_MODULES[name]), name)
            globals()[name] = value
            return value
        if not name.startswith("_"):
            try:
                return importlib.import_module(f"fastfar.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"fastfar.{name}":
                    raise
        raise AttributeError(f"module 'fastfar' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
