"""From a training run to a model that can be sampled: averaged weights, tokenizer, plan, names."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastfar.checkpoint import save_pretrained
from fastfar.data import Examples
from fastfar.model import FAR
from fastfar.plan import SamplingPlan, cosine_mask_ratios
from fastfar.tokenizer import KLVAE, PixelTokenizer, tokenizer_from_dict
from fastfar.training.ema import EMA
from fastfar.training.loop import tokenizer_of
from fastfar.training.recipe import Recipe
from fastfar.training.start import new_model
from fastfar.training.state import read_state


def default_plan(recipe: Recipe, tokenizer: PixelTokenizer | KLVAE) -> SamplingPlan:
    """How a model that was trained here is sampled unless told otherwise.

    At the levels that it was trained at, or at 0, 2, 3, ..., 10 of 16 (as far as the model has
    them); each step's input is low-passed to the level that it is told. A model that was trained to
    give the next level is sampled at every level it knows, and its results are not filtered again.
    Masked if it was trained so. Guidance and temperature rise as in
    `SamplingPlan.official("mask")`. x0 is bounded by what the tokenizer can show: a short training
    does not predict the noise near t = 999 well enough to do without (a KL-VAE has no bound).
    Levels, guidance and T = 16 are those that measured best on the demo (benchmarks/LOG.md);
    without bounds it takes the published T = 100.
    """
    next_level, known = recipe.target == "next_level", recipe.config.num_levels
    levels = recipe.levels or (0, *range(2, min(known, 10) + 1))
    if next_level and recipe.levels is None:
        levels = tuple(range(known))
    n = len(levels)
    x0_range = tokenizer.x0_range if isinstance(tokenizer, PixelTokenizer) else None
    return SamplingPlan(
        levels=levels,
        input_levels=(None, *(None if next_level else level for level in levels[1:])),
        guidance_scale=3.0,
        guidance_ramp=tuple(k / n for k in range(n)),
        temperatures=tuple(0.85 + 0.15 * k / n for k in range(n)),
        diffusion_steps=(16 if x0_range else 100,) * n,
        mask_ratios=cosine_mask_ratios(n) if recipe.mask_rule else None,
        x0_range=x0_range,
    )


def export_model(
    folder: str | os.PathLike[str],
    model: FAR,
    recipe: Recipe,
    tokenizer: PixelTokenizer | KLVAE,
    class_names: Sequence[str],
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write `model`, in `dtype`, as a folder for `FARPipeline.from_pretrained`. Changes its dtype.

    `recipe` is what it was trained by, which decides the plan (`default_plan`).

    Raises:
        OSError: the disk is full or the folder cannot be written; old files are intact.
    """
    plan = default_plan(recipe, tokenizer)
    save_pretrained(folder, model.to(dtype), tokenizer, plan, class_names)


def export_run(
    run: Path,
    folder: str | os.PathLike[str],
    dtype: torch.dtype = torch.bfloat16,
    load_data: Callable[[], Examples] | None = None,
) -> int:
    """Export the averaged weights of a training run's last save; the step they are of.

    Args:
        run: the folder of the run.
        folder: where to write.
        dtype: of the stored weights.
        load_data: gives what was trained on; called only where the tokenizer is not in the folder:
            a KL-VAE's weights never are.

    Raises:
        FileNotFoundError, ValueError: no usable checkpoint; or it lacks the tokenizer, and there is
            no `load_data`.
        OSError: as `export_model`.
    """
    state = read_state(run, ("ema",))
    recipe = Recipe.from_dict(state["recipe"])
    if state.get("tokenizer", {}).get("type") == "pixel":
        tokenizer, names = tokenizer_from_dict(state["tokenizer"]), state["class_names"]
    elif load_data is not None:
        data = load_data()
        tokenizer, names = tokenizer_of(data), data.class_names
    else:
        raise ValueError(f"{run} does not hold its tokenizer: exporting it needs its data")
    model = averaged_model(recipe, state["ema"])
    export_model(folder, model, recipe, tokenizer, names, dtype)
    return int(state["step"])


def averaged_model(recipe: Recipe, averages: dict[str, Any]) -> FAR:
    """The model of a recipe in eval mode, with what `read_state` gives as "ema"."""
    model = new_model(recipe).eval()
    ema = EMA(model, 0.0)
    ema.load_state_dict(averages)
    ema.copy_to(model)
    return model
