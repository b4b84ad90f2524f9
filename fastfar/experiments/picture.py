"""The same seeds by several samplers, one below the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fastfar.data import balanced_labels
from fastfar.evaluation.samples import image_generator
from fastfar.experiments.base import Setting
from fastfar.pictures import make_grid
from fastfar.plan import SamplingPlan

if TYPE_CHECKING:
    from PIL import Image

COUNT = 20  # images a row


def side_by_side(setting: Setting, plans: Mapping[str, SamplingPlan]) -> Image.Image:
    """A labelled row of `COUNT` images for every plan; a column is one label and one seed."""
    seed, rows = setting.seeds[0], []
    for name, plan in plans.items():
        setting.tell(f"picture: {name}")
        drawn = setting.pipeline(
            balanced_labels(COUNT),
            plan=plan,
            generator=[image_generator(seed, i) for i in range(COUNT)],
            backend=setting.backend,
        )
        rows.append(drawn.images)
    return make_grid(rows, scale=2, labels=list(plans))
