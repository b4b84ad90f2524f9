"""Figures of quality: the metrics against closed forms, the evaluator, floor and ceilings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from idx import write_fashion_mnist

import fastfar
from fastfar.data import ImageDataset, load_fashion_mnist
from fastfar.evaluation import (
    METRIC,
    FashionClassifier,
    FeatureStatistics,
    Judge,
    accuracy,
    class_agreement,
    comparisons,
    evaluate,
    extract,
    frechet_distance,
    load_classifier,
    precision_recall,
    save_classifier,
    train_classifier,
)
from fastfar.evaluation.metrics import RunningStatistics


def gaussian(mean: Any, covariance: Any) -> FeatureStatistics:
    return FeatureStatistics(np.asarray(mean, float), np.asarray(covariance, float), 100)


def rotation(size: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


# --- Frechet distance ------------------------------------------------------------------------


def test_frechet_distance_of_aligned_gaussians() -> None:
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 1.0, 0.25])
    turn = rotation(3, 0)
    first = gaussian([0, 0, 0], turn @ np.diag(a) @ turn.T)
    second = gaussian([1, 2, 2], turn @ np.diag(b) @ turn.T)
    expected = 9 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_turned_gaussians() -> None:
    # In two dimensions tr (S1 S2)^1/2 = (tr S1 S2 + 2 (det S1 det S2)^1/2)^1/2.
    turn = rotation(2, 1)
    s1, s2 = np.diag([5.0, 0.5]), turn @ np.diag([3.0, 0.1]) @ turn.T
    overlap = np.sqrt(np.trace(s1 @ s2) + 2 * np.sqrt(np.linalg.det(s1) * np.linalg.det(s2)))
    expected = np.trace(s1) + np.trace(s2) - 2 * overlap
    assert not np.allclose(s1 @ s2, s2 @ s1)
    found = frechet_distance(gaussian([0, 0], s1), gaussian([0, 0], s2))
    assert found == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_with_a_singular_covariance() -> None:
    first, second = gaussian([3, 0], np.zeros((2, 2))), gaussian([0, 4], np.diag([4.0, 0.0]))
    assert frechet_distance(first, second) == pytest.approx(25 + 4, rel=1e-12)


def test_frechet_distance_of_a_set_to_itself_and_to_its_shift() -> None:
    rows = np.random.default_rng(0).normal(size=(500, 7)) @ np.diag(np.arange(1, 8))
    here = FeatureStatistics.of(rows)
    assert np.allclose(here.covariance, np.cov(rows.T), rtol=1e-12)
    assert frechet_distance(here, here) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(here, FeatureStatistics.of(rows + 2)) == pytest.approx(28, rel=1e-9)


def test_statistics_of_parts_are_those_of_the_whole() -> None:
    rows = np.random.default_rng(0).normal(size=(501, 7)) @ np.diag(np.arange(1, 8)) + 1e6
    running = RunningStatistics()
    for part in np.split(rows, [1, 3, 3, 200]):  # one row, two, none, many
        running.add(part)
    found = running.statistics()
    assert found.count == 501
    assert np.allclose(found.mean, rows.mean(0), rtol=1e-14)
    assert np.allclose(found.covariance, np.cov(rows.T), rtol=1e-8, atol=1e-8)


def test_bad_statistics_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 images, got 0"):
        RunningStatistics().statistics()
    with pytest.raises(ValueError, match="at least 2"):
        FeatureStatistics.of(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="NaN"):
        FeatureStatistics.of(np.full((5, 3), np.nan))
    with pytest.raises(ValueError, match="widths differ: 1 and 2"):
        frechet_distance(gaussian([0], [[1]]), gaussian([0, 0], np.eye(2)))


# --- precision and recall --------------------------------------------------------------------


def slow_share(points: np.ndarray, centres: np.ndarray, k: int) -> float:
    radii = [np.sort(np.linalg.norm(centres - c, axis=1))[k] for c in centres]  # 0 is c itself
    inside = [
        any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True)) for p in points
    ]
    return float(np.mean(inside))


@pytest.mark.parametrize("k", [1, 3])
def test_precision_recall_is_its_definition(k: int) -> None:
    rng = np.random.default_rng(k)
    real, made = rng.normal(size=(40, 3)), rng.normal(size=(50, 3)) * 0.6 + 0.4
    expected = slow_share(made, real, k), slow_share(real, made, k)
    assert precision_recall(real, made, k=k) == expected
    assert precision_recall(real, made, k=k, chunk=7) == expected
    assert 0 < expected[1] < expected[0] <= 1


def test_precision_recall_of_equal_and_of_distant_sets() -> None:
    points = np.random.default_rng(0).normal(size=(200, 5))
    assert precision_recall(points, points) == (1.0, 1.0)
    assert precision_recall(points, points + 100) == (0.0, 0.0)


def test_dropping_a_mode_costs_recall_not_precision() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(100, 4)), rng.normal(size=(100, 4)) + 50
    precision, recall = precision_recall(np.concatenate([left, right]), left)
    assert precision == 1.0 and recall == 0.5


def test_repeated_points_have_a_ball_of_radius_zero() -> None:
    real = np.random.default_rng(0).normal(size=(50, 3)) * 10 + 1000
    copies = np.repeat(real[:5], 10, axis=0)
    precision, recall = precision_recall(real, copies)
    assert precision == 1.0 and recall == 0.1


@pytest.mark.parametrize("k", [0, 5, 6])
def test_k_must_be_smaller_than_the_set(k: int) -> None:
    points = np.random.default_rng(0).normal(size=(5, 2))
    with pytest.raises(ValueError, match=f"k = {k} nearest neighbours of 5 images"):
        precision_recall(points, points, k=k)
    assert precision_recall(points, points, k=4) == (1.0, 1.0)


def test_feature_widths_must_agree() -> None:
    with pytest.raises(ValueError, match="widths differ"):
        precision_recall(np.zeros((5, 2)), np.zeros((5, 3)))
    with pytest.raises(ValueError, match="shape"):
        precision_recall(np.zeros(5), np.zeros((5, 3)))


def test_class_agreement() -> None:
    assert class_agreement([1, 2, 3, 4], [1, 2, 0, 0]) == 0.5
    with pytest.raises(ValueError, match="equally long"):
        class_agreement([1, 2], [1])
    with pytest.raises(ValueError, match="non-empty"):
        class_agreement([], [])


# --- the evaluator ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("idx")
    write_fashion_mnist(folder, train=320, test=80)
    return folder


@pytest.fixture(scope="module")
def train(files: Path) -> ImageDataset:
    return load_fashion_mnist("train", files)


@pytest.fixture(scope="module")
def test(files: Path) -> ImageDataset:
    return load_fashion_mnist("test", files)


SMALL = (8, 8, 8, 16)


def learn(train: ImageDataset, seed: int, losses: list[float]) -> FashionClassifier:
    return train_classifier(
        train,
        epochs=6,
        batch_size=16,
        learning_rate=1e-2,
        seed=seed,
        max_shift=0,
        dtype=torch.float32,
        widths=SMALL,
        on_epoch=lambda epoch, loss: losses.append(loss),
    )


@pytest.fixture(scope="module")
def evaluator(train: ImageDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small evaluator of the synthetic data."""
    folder = tmp_path_factory.mktemp("evaluator")
    save_classifier(learn(train, 1, []), folder, {})
    return folder


def test_training_learns_and_repeats(train: ImageDataset, test: ImageDataset) -> None:
    losses: list[float] = []

    state = torch.random.get_rng_state()
    model = learn(train, 1, losses)
    assert torch.equal(state, torch.random.get_rng_state()), "the global generator was moved"
    assert len(losses) == 6 and losses[-1] < 0.5 * losses[0]
    assert accuracy(model, test) > 0.5, "no better than guessing: chance is 0.1"
    learn(train, 1, losses)
    assert losses[:6] == losses[6:]


def test_shifts_move_whole_images() -> None:
    from fastfar.evaluation.classifier import _shifted

    images = torch.zeros(200, 32, 32, dtype=torch.uint8)
    images[:, 10, 20] = 7
    moved = _shifted(images, 2, torch.Generator().manual_seed(0))
    places = torch.nonzero(moved == 7)[:, 1:]
    assert moved.shape == images.shape and len(places) == 200
    assert {(int(y), int(x)) for y, x in places} == {
        (y, x) for y in range(8, 13) for x in range(18, 23)
    }


def test_bad_training_arguments(train: ImageDataset) -> None:
    for wrong in ({"epochs": 0}, {"batch_size": 1}, {"batch_size": 321}):
        with pytest.raises(ValueError, match="epochs must be at least 1"):
            train_classifier(train, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="four positive"):
        FashionClassifier((1, 2, 3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="32, 32"):
        FashionClassifier()(torch.zeros(1, 1, 28, 28))


def test_saving_keeps_the_classifier(tmp_path: Path, test: ImageDataset) -> None:
    torch.manual_seed(0)
    model = FashionClassifier((4, 5, 6, 7)).eval()
    save_classifier(model, tmp_path, {"epochs": 3}, dtype=torch.float32)
    loaded = load_classifier(tmp_path)
    assert torch.equal(extract(loaded, test.images)[0], extract(model, test.images)[0])
    assert len(loaded.fingerprint) == 12
    first = loaded.fingerprint
    save_classifier(model, tmp_path, {"epochs": 4}, dtype=torch.float32)
    assert load_classifier(tmp_path).fingerprint == first, "not a function of the weights alone"
    save_classifier(FashionClassifier((4, 5, 6, 7)), tmp_path, {}, dtype=torch.float32)
    assert load_classifier(tmp_path).fingerprint != first
    assert json.loads((tmp_path / "config.json").read_text())["widths"] == [4, 5, 6, 7]


def test_damaged_evaluators_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="train-classifier"):
        load_classifier(tmp_path)
    save_classifier(FashionClassifier((4, 5, 6, 7)), tmp_path, {})
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole, text = weights.read_bytes(), config.read_text()
    for content in (b"", whole[: len(whole) // 2], b"not safetensors at all"):
        weights.write_bytes(content)
        with pytest.raises(ValueError, match="not a fastfar evaluator"):
            load_classifier(tmp_path)
    weights.write_bytes(whole)
    for content in ("{", "[]", text.replace("evaluator", "other"), text.replace("4,", "3,")):
        config.write_text(content)
        with pytest.raises(ValueError, match="not a fastfar evaluator"):
            load_classifier(tmp_path)


def test_an_untrained_evaluator_judges_nothing(test: ImageDataset) -> None:
    with pytest.raises(ValueError, match="untrained"):
        Judge(FashionClassifier(), test)


def test_the_embedded_evaluator() -> None:
    model = load_classifier()
    size = sum(
        file.stat().st_size for file in Path(fastfar.__file__).parent.glob("assets/evaluator/*")
    )
    assert size < 1.5e6
    card = (Path(fastfar.__file__).parent / "assets/evaluator/README.md").read_text()
    assert model.fingerprint in card, "the card describes other weights"
    try:
        test = load_fashion_mnist("test")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    part = ImageDataset(test.images[:1000], test.labels[:1000], test.class_names)
    assert accuracy(model, part) > 0.90


# --- the whole -------------------------------------------------------------------------------


def test_floor_and_ceilings(train: ImageDataset) -> None:
    sets = comparisons(train, 100)
    assert [kind for kind, _, _ in sets.values()] == ["floor", "ceiling", "ceiling", "ceiling"]
    for _, images, labels in sets.values():
        assert images.shape == (100, 32, 32) and images.dtype == torch.uint8
        assert torch.bincount(labels).tolist() == [10] * 10
    _, means, labels = sets["class-mean image"]
    expected = train.images[train.labels == 4].double().mean(0).round()
    assert torch.equal(means[labels == 4].double(), expected.expand(10, -1, -1))
    again = comparisons(train, 100)
    assert all(torch.equal(sets[name][1], again[name][1]) for name in sets)


def test_evaluate(train: ImageDataset, test: ImageDataset, evaluator: Path) -> None:
    classifier = load_classifier(evaluator)
    seen: list[str] = []
    result = evaluate(
        {"the test split itself": (test.images, test.labels), "black": (test.images * 0, None)},
        train=train,
        test=test,
        classifier=classifier,
        on_row=lambda row: seen.append(row.name),
    )
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == seen and len(rows) == 6
    for row in rows.values():
        assert row["count"] == 80 and row["reference"] == "test 80"
        assert row["extractor"] == result["extractor"] == classifier.fingerprint
    same = rows["the test split itself"]
    assert same[METRIC] == pytest.approx(0, abs=1e-6)
    assert (same["precision"], same["recall"]) == (1.0, 1.0)
    assert same["class_agreement"] == result["extractor_accuracy"]
    assert rows["train split"][METRIC] < 0.2 * rows["uniform noise"][METRIC]
    assert result["fd_over_floor"]["the test split itself"] == pytest.approx(0, abs=1e-4)
    black = rows["black"]
    assert black["class_agreement"] is None and black["recall"] < 0.1
    ratio = black[METRIC] / rows["train split"][METRIC]
    assert result["fd_over_floor"]["black"] == pytest.approx(ratio) and ratio > 2
    assert json.loads(json.dumps(result)) == result

    judge = Judge(classifier, test)
    unlabelled = judge.score("x", "samples", test.images, None)
    assert unlabelled.class_agreement is None
    with pytest.raises(ValueError, match="3 images are too few"):
        judge.score("x", "samples", test.images[:3], None)
