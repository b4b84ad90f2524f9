"""One experiment of the paper, from its variants to their rows and to a picture of them.

Legend: B image, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

from fastfar.data import load_fashion_mnist
from fastfar.evaluation.samples import digest
from fastfar.experiments.base import Candidate, Row, Rows, Setting, Tell
from fastfar.experiments.images import Images, judge_of
from fastfar.experiments.paper import Study, Variant
from fastfar.experiments.trained import is_trained, run_key, told, train, training_facts
from fastfar.pictures import make_grid
from fastfar.pipeline import FARPipeline, to_pil
from fastfar.tokenizer import PixelTokenizer
from fastfar.training import Recipe, default_plan

if TYPE_CHECKING:
    from PIL import Image

EXPERIMENT, FLOOR = "paper", "real images"
COLUMNS = 20  # images a row of the picture


@dataclass
class Studio:
    """What the paper's experiments run with.

    Attributes:
        recipe: base recipe.
        work: folder of models and samples.
        output: JSONL file of the rows.
        samples: images a seed; seeds: of training and of sampling alike.
        trains: whether models that are not there are trained; otherwise they are left out.
        data, backend, batch_size, tell: see `Setting`.
    """

    recipe: Recipe
    work: Path
    output: Path
    samples: int = 1000
    seeds: tuple[int, ...] = (0, 1, 2)
    trains: bool = True
    data: Path | None = None
    backend: str = "auto"
    batch_size: int = 100
    tell: Tell = field(default=lambda text: None)

    def recipe_of(self, variant: Variant, seed: int) -> Recipe:
        """The base recipe with the variant's changes."""
        changes = {**variant.recipe, "seed": seed}
        if "model" in changes:
            model = self.recipe.model
            sizes = model if isinstance(model, Mapping) else self.recipe.config.to_dict()
            changes["model"] = {**sizes, **changes["model"]}
        return self.recipe.with_changes(changes)

    def folder_of(self, recipe: Recipe) -> Path:
        """Of the run of a recipe."""
        return self.work / "runs" / run_key(recipe)

    def ready(
        self, variant: Variant, seed: int, trains: bool
    ) -> tuple[Setting, Candidate] | None:
        """The trained model and how the variant samples it; None where it may not be trained."""
        recipe = self.recipe_of(variant, seed)
        folder = self.folder_of(recipe)
        if not is_trained(folder):
            if not trains:
                return None
            self.tell(f"training {variant.name}, seed {seed}")
            train(recipe, folder, self.data, self.tell)
        pipeline = _pipeline(folder / "export")
        plan = pipeline.plan
        if variant.levels is not None:
            tokenizer = cast("PixelTokenizer", pipeline.tokenizer)
            plan = default_plan(recipe.with_changes({"levels": variant.levels}), tokenizer)
        about: Row = {"recipe": told(recipe), "training": training_facts(recipe, folder)}
        setting = Setting(
            pipeline,
            self.work,
            self.output,
            samples=self.samples,
            seeds=(seed,),
            data=self.data,
            backend=self.backend,
            checkpoint=folder.name,
            batch_size=self.batch_size,
            about=about,
            tell=self.tell,
        )
        return setting, Candidate(variant.name, plan.with_changes(**variant.plan))


@lru_cache(maxsize=1)
def _pipeline(export: Path) -> FARPipeline:
    """The last one read: several variants sample one model."""
    return FARPipeline.from_pretrained(export)


def run_study(study: Study, studio: Studio, rows: Rows, names: tuple[str, ...] = ()) -> list[str]:
    """Make every row of the study that is not there yet; stopped, it goes on where it was.

    Args:
        names: of the variants to run; none is all.

    Returns:
        what is missing since it may not be trained, as "variant, seed s".

    Raises:
        KeyboardInterrupt: Ctrl-C.
        ValueError: a row's numbers cannot be: see `Judge.score`.
    """
    missing = []
    for seed in studio.seeds:
        _floor(study, studio, rows, seed)
        for variant in _chosen(study, names):
            ready = studio.ready(variant, seed, studio.trains)
            if ready is None:
                missing.append(f"{variant.name}, seed {seed}")
                continue
            setting, candidate = ready
            Images(setting, rows, EXPERIMENT).scores(study.name, candidate)
    return missing


def _chosen(study: Study, names: tuple[str, ...]) -> Iterator[Variant]:
    return (variant for variant in study.variants if not names or variant.name in names)


def _floor(study: Study, studio: Studio, rows: Rows, seed: int) -> None:
    """The row of as many real images: nothing that models them can be expected below it."""
    judge = judge_of(studio.data)

    def score() -> Row:
        train = load_fashion_mnist("train", studio.data)
        real = train.balanced(studio.samples, seed=seed)
        return judge.score(FLOOR, "floor", real.images, real.labels).to_dict()

    name: Row = {"experiment": EXPERIMENT, "part": study.name, "candidate": FLOOR, "kind": "floor"}
    name |= {"place": str(seed), "samples": studio.samples}
    rows.get(name, digest(["floor", seed, studio.samples, judge.extractor]), score)


def picture(study: Study, studio: Studio, rows: Rows) -> Image.Image | None:
    """A labelled row of images for every variant whose model is there; a column is one label.

    All are drawn with the first seed. None where no model is there.
    """
    seed = studio.seeds[0]
    pictures: dict[str, list[Image.Image]] = {}
    for variant in study.variants:
        ready = studio.ready(variant, seed, trains=False)
        if ready is not None:
            setting, candidate = ready
            setting.samples = min(studio.samples, COLUMNS)
            images_BHW = Images(setting, rows, EXPERIMENT).draw(candidate, seed)
            pictures[variant.name] = to_pil((images_BHW[..., None].float() / 255.0).numpy())
    return make_grid(list(pictures.values()), scale=2, labels=list(pictures)) if pictures else None
