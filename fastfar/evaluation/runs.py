"""The models of a training run, to be judged side by side: raw weights and their average."""

from __future__ import annotations

from pathlib import Path

from fastfar._weights import open_weights
from fastfar.pipeline import FARPipeline
from fastfar.tokenizer import KLVAE, tokenizer_from_dict
from fastfar.training.export import averaged_model, default_plan
from fastfar.training.recipe import Recipe
from fastfar.training.start import new_model
from fastfar.training.state import read_state

WEIGHTS = {"raw": ("raw",), "ema": ("ema",), "both": ("ema", "raw")}


def run_pipelines(
    folder: Path, weights: str = "ema", vae: KLVAE | None = None
) -> dict[str, FARPipeline]:
    """Pipelines of a run's last save: "ema" with the averaged weights, "raw" with the latest.

    Both have the plan that the run would be exported with.

    Args:
        folder: of the run.
        weights: "raw", "ema" or "both".
        vae: of runs on its latents; the folder of a run does not hold it.

    Raises:
        FileNotFoundError, ValueError: there is no usable save, or the KL-VAE is needed.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights!r} is not known; allowed: {', '.join(WEIGHTS)}")
    state = read_state(folder, ("model", "ema"))
    said = state.get("tokenizer", {})
    if said.get("type") != "pixel" and vae is None:
        raise ValueError(
            f"{folder} does not hold its tokenizer: give the KL-VAE that made its latents (--vae "
            "FILE), or export the run (fastfar train --export-only) and evaluate the export"
        )
    # With the run's own scale, which need not be the published one.
    weights_of_vae = None if vae is None else open_weights(vae.state_dict())
    tokenizer = tokenizer_from_dict(said, weights_of_vae)
    recipe = Recipe.from_dict(state["recipe"])
    plan, pipelines = default_plan(recipe, tokenizer), {}
    for name in WEIGHTS[weights]:
        if name == "raw":
            model = new_model(recipe).eval()
            model.load_state_dict(state["model"])
        else:
            model = averaged_model(recipe, state["ema"])
        pipelines[name] = FARPipeline(model, tokenizer, plan, state["class_names"])
    return pipelines
