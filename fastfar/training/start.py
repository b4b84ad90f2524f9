"""The model that a run starts with."""

from __future__ import annotations

import torch

from fastfar.model import FAR
from fastfar.training.recipe import Recipe


def new_model(recipe: Recipe) -> FAR:
    """The untrained model of a recipe, on the CPU; PyTorch's random numbers stay as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return FAR(recipe.config)


def first_model(recipe: Recipe) -> FAR:
    """`new_model` with the weights, as float32, of the checkpoint that the recipe names, if any.

    Raises:
        ValueError: it is a model of other sizes.
        FileNotFoundError: there is no such checkpoint.
    """
    model = new_model(recipe)
    if recipe.init is None:
        return model
    given = FAR.from_pretrained(recipe.init)
    if given.config != model.config:
        mine, theirs = model.config.to_dict(), given.config.to_dict()
        differing = ", ".join(
            f"{name} {theirs[name]!r} instead of {mine[name]!r}"
            for name in mine
            if mine[name] != theirs[name]
        )
        raise ValueError(
            f"init={recipe.init!r} is another model ({differing}): give one of these sizes"
        )
    model.load_state_dict(given.state_dict())
    return model
