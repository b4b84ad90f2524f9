"""The two ways in which `fastfar eval` judges, each with its table."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from fastfar._version import __version__
from fastfar.cli._eval_report import fashion_report, published_report
from fastfar.cli._eval_samples import Drawn, own_device
from fastfar.data import IMAGE_SIZE, Examples, load_fashion_mnist, open_data
from fastfar.evaluation import METRIC, evaluate, load_classifier, load_images
from fastfar.evaluation.extractors import embed_all
from fastfar.evaluation.files import image_batches
from fastfar.evaluation.inception import Inception
from fastfar.evaluation.metrics import NEIGHBOURS
from fastfar.evaluation.reference import (
    Reference,
    data_batches,
    read_reference,
    reference_of,
    write_reference,
)
from fastfar.evaluation.scores import SPLITS, score


class Judging(Protocol):
    """A way to judge. Whatever can be wrong with it is found when it is made."""

    def found(self) -> Drawn:
        """The images of --images."""
        ...

    def check(self, shape: tuple[int, int, int]) -> None:
        """ValueError where it does not take images of this shape (C, H, W)."""
        ...

    def judge(self, drawn: Sequence[Drawn]) -> dict[str, Any]:
        """All figures, ready for JSON."""
        ...

    def report(self, result: dict[str, Any]) -> str:
        """The table for people."""
        ...


class ByFashion:
    """Against Fashion-MNIST, with floor and ceilings."""

    def __init__(self, args: argparse.Namespace) -> None:
        if args.reference is not None or args.save_reference is not None:
            raise ValueError("--reference and --save-reference go with --inception")
        self.images = args.images
        self.train = load_fashion_mnist("train", args.data)
        self.test = load_fashion_mnist("test", args.data)
        self.classifier = load_classifier(args.evaluator)

    def found(self) -> Drawn:
        images_BHW, labels_B = load_images(self.images)
        about = {"images": str(self.images)}
        return Drawn(self.images.name, about, labels_B, lambda: iter([images_BHW]))

    def check(self, shape: tuple[int, int, int]) -> None:
        if shape != (1, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(
                f"this checkpoint makes images of shape {shape} (C, H, W); {METRIC} is of "
                f"Fashion-MNIST, {(1, IMAGE_SIZE, IMAGE_SIZE)}. Give --inception and --reference"
            )

    def judge(self, drawn: Sequence[Drawn]) -> dict[str, Any]:
        sets = {one.name: (torch.cat(list(one.batches())), one.labels) for one in drawn}
        with tqdm(total=len(sets) + 4, desc="judging", unit="set", leave=False) as bar:
            return evaluate(
                sets,
                train=self.train,
                test=self.test,
                classifier=self.classifier,
                on_row=lambda row: bar.update(),
            )

    def report(self, result: dict[str, Any]) -> str:
        return fashion_report(result)


class ByInception:
    """By the Inception network, against published statistics or any real images."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        if args.reference is None:
            raise ValueError(
                "--inception needs --reference: an .npz file of statistics (for ImageNet "
                "VIRTUAL_imagenet256_labeled.npz of guided-diffusion), or a folder of real images"
            )
        self.extractor = Inception(args.inception, own_device(args.device))
        self.reference: Reference | None = None
        self._data: Examples | None = None
        if args.reference.endswith(".npz"):
            self.reference = read_reference(args.reference, self.extractor)

    def found(self) -> Drawn:
        about = {"images": str(self.args.images)}
        return Drawn(self.args.images.name, about, None, lambda: image_batches(self.args.images))

    def check(self, shape: tuple[int, int, int]) -> None:
        if self.reference is None:
            self._real_images(shape[-1])

    def _real_images(self, size: int) -> Examples:
        """Opened once: a large folder takes long to list."""
        if self._data is None:
            self._data = open_data(self.args.reference, size=size)
        return self._data

    def judge(self, drawn: Sequence[Drawn]) -> dict[str, Any]:
        start = time.perf_counter()
        if self.reference is None:
            data = self._real_images(next(drawn[0].batches()).shape[-1])
            batches = tqdm(data_batches(data), desc="real images", total=-(-len(data) // 100))
            name = Path(self.args.reference).name
            self.reference = reference_of(name, self.extractor, batches)
        if self.args.save_reference is not None:
            write_reference(self.args.save_reference, self.reference, self.extractor)
        rows = []
        for one in drawn:
            batches = tqdm(one.batches(), desc="samples", unit="batch")
            features = embed_all(self.extractor, batches)
            rows.append(score(one.name, features, self.extractor, self.reference).to_dict())
        return {
            "metric": self.extractor.metric,
            "extractor": self.extractor.fingerprint,
            "reference": str(self.reference),
            "neighbours": NEIGHBOURS,
            "splits": SPLITS,
            "rows": rows,
            "seconds": round(time.perf_counter() - start, 3),
            "fastfar": __version__,
        }

    def report(self, result: dict[str, Any]) -> str:
        return published_report(result)
