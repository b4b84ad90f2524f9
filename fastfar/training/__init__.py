"""Training: draws and loss, recipe, EMA, the loop, export."""

from fastfar.training.ema import EMA
from fastfar.training.export import default_plan, export_model, export_run
from fastfar.training.loop import Trainer
from fastfar.training.loss import TrainingDraws, diffusion_loss, sample_draws
from fastfar.training.recipe import Recipe

__all__ = [
    "EMA",
    "Recipe",
    "Trainer",
    "TrainingDraws",
    "default_plan",
    "diffusion_loss",
    "export_model",
    "export_run",
    "sample_draws",
]
