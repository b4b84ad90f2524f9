"""fastfar: frequency autoregressive image generation, as fast as the machine allows."""

from fastfar._version import __version__
from fastfar.checkpoint import load_official
from fastfar.config import FARConfig
from fastfar.model import FAR
from fastfar.noise import SeededNoise, TensorNoise
from fastfar.pipeline import FARPipeline
from fastfar.plan import SamplingPlan
from fastfar.sampling import sample_latents
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
    "TensorNoise",
    "TrainingDraws",
    "__version__",
    "diffusion_loss",
    "load_official",
    "sample_latents",
]
