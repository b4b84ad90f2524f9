"""The same seeds by several samplers, one below the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

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
    seed = setting.seeds[0]
    rows: list[list[Image.Image]] = []
    for name, plan in plans.items():
        setting.tell(f"picture: {name}")
        pipeline: Any = setting.pipeline
        (images,) = pipeline(
            balanced_labels(COUNT),
            plan=plan,
            generator=[image_generator(seed, i) for i in range(COUNT)],
            backend=setting.backend,
            return_dict=False,
        )
        rows.append(cast("list[Image.Image]", images))
    return make_grid(rows, scale=2, labels=list(plans))
