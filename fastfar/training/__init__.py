"""Training: draws and loss, recipe, EMA, the loop."""

from fastfar.training.ema import EMA
from fastfar.training.loop import Trainer, TrainingData
from fastfar.training.loss import TrainingDraws, diffusion_loss, sample_draws
from fastfar.training.recipe import Recipe

__all__ = [
    "EMA",
    "Recipe",
    "Trainer",
    "TrainingData",
    "TrainingDraws",
    "diffusion_loss",
    "sample_draws",
]
