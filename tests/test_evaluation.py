"""Figures of quality: the metrics against closed forms, the evaluator, and resumable sampling."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from idx import write_fashion_mnist
from PIL import Image

import fastfar
from fastfar import cli
from fastfar.data import ImageDataset, balanced_labels, load_fashion_mnist
from fastfar.evaluation import (
    METRIC,
    FashionClassifier,
    FeatureStatistics,
    Judge,
    SampleStore,
    accuracy,
    class_agreement,
    comparisons,
    draw_samples,
    evaluate,
    extract,
    frechet_distance,
    load_classifier,
    load_images,
    precision_recall,
    save_classifier,
    train_classifier,
)
from fastfar.evaluation.samples import image_generator, unit_to_uint8, weights_fingerprint
from fastfar.plan import SamplingPlan


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


def test_bad_statistics_are_refused() -> None:
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


def test_training_learns_and_repeats(train: ImageDataset, test: ImageDataset) -> None:
    losses: list[float] = []

    def learn(seed: int) -> FashionClassifier:
        return train_classifier(
            train,
            epochs=6,
            batch_size=32,
            seed=seed,
            max_shift=0,
            dtype=torch.float32,
            on_epoch=lambda epoch, loss: losses.append(loss),
        )

    state = torch.random.get_rng_state()
    model = learn(1)
    assert torch.equal(state, torch.random.get_rng_state()), "the global generator was moved"
    assert len(losses) == 6 and losses[-1] < 0.5 * losses[0]
    assert accuracy(model, test) > 0.5, "no better than guessing: chance is 0.1"
    assert losses[:6] == (learn(1) and losses[6:])


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


# --- where samples come from -----------------------------------------------------------------


class StandIn:
    """A pipeline whose images depend on label and generator alone; stops after `limit` calls."""

    def __init__(self, limit: int | None = None) -> None:
        self.model = torch.nn.Linear(2, 2)
        torch.nn.init.ones_(self.model.weight)
        torch.nn.init.zeros_(self.model.bias)
        self.plan = SamplingPlan.official()
        self.limit, self.batches, self.calls = limit, list[int](), list[dict[str, Any]]()

    def __call__(
        self,
        class_labels: list[int],
        *,
        generator: list[torch.Generator],
        output_type: str,
        **call: Any,
    ) -> Any:
        assert output_type == "pt" and len(class_labels) == len(generator)
        if self.limit == len(self.batches):
            raise KeyboardInterrupt
        self.batches.append(len(class_labels))
        self.calls.append(call)
        images = [torch.rand((1, 32, 32), generator=g) for g in generator]
        return SimpleNamespace(
            images=torch.stack(images) * torch.tensor(class_labels).view(-1, 1, 1, 1) / 9
        )


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    run = {"weights": "abc", "plan": {"levels": (0, 2)}}
    whole, labels, new = draw_samples(
        StandIn(), 37, SampleStore(tmp_path / "a", run), batch_size=37
    )
    assert new == 37 and torch.equal(labels, balanced_labels(37))
    assert whole.dtype == torch.uint8 and whole.shape == (37, 32, 32)

    with pytest.raises(KeyboardInterrupt):
        draw_samples(StandIn(limit=2), 37, SampleStore(tmp_path / "b", run), batch_size=10)
    seen: list[tuple[int, int]] = []
    again = StandIn()
    resumed, _, new = draw_samples(
        again,
        37,
        SampleStore(tmp_path / "b", run),
        batch_size=7,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert new == 17 and again.batches == [7, 7, 3]
    assert seen == [(20, 37), (27, 37), (34, 37), (37, 37)]
    assert torch.equal(resumed, whole), "an image depends on its batch"

    nothing = StandIn(limit=0)
    fewer, _, new = draw_samples(nothing, 25, SampleStore(tmp_path / "b", run))
    assert new == 0 and torch.equal(fewer, whole[:25])


def test_damaged_and_missing_chunks_are_drawn_again(tmp_path: Path) -> None:
    store = SampleStore(tmp_path, {})
    whole, _, _ = draw_samples(StandIn(), 40, store, batch_size=10)
    (tmp_path / "000010-000020.npy").write_bytes(b"\x93NUMPY")
    (tmp_path / "000030-000040.npy").unlink()
    pipeline = StandIn()
    again, _, new = draw_samples(pipeline, 40, store, batch_size=15)
    assert new == 20 and pipeline.batches == [10, 10], "a batch must not run over a gap"
    assert torch.equal(again, whole)


def test_samples_of_another_run_are_not_mixed_in(tmp_path: Path) -> None:
    SampleStore(tmp_path, {"seed": 0, "weights": "abc"})
    SampleStore(tmp_path, {"seed": 0, "weights": "abc"})
    with pytest.raises(ValueError, match="another run .different: weights"):
        SampleStore(tmp_path, {"seed": 0, "weights": "abd"})
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        SampleStore(tmp_path, {"seed": 0})


def test_bad_sampling_arguments(tmp_path: Path) -> None:
    store = SampleStore(tmp_path, {})
    with pytest.raises(ValueError, match="batch size is 0"):
        draw_samples(StandIn(), 10, store, batch_size=0)
    with pytest.raises(ValueError, match="number of images is 0"):
        draw_samples(StandIn(), 0, store)
    with pytest.raises(ValueError, match="seed is -1"):
        draw_samples(StandIn(), 10, store, seed=-1)


def test_every_image_has_its_own_generator() -> None:
    drawn = {
        float(torch.rand((), generator=image_generator(seed, image), dtype=torch.float64))
        for seed in range(4)
        for image in range(50)
    }
    assert len(drawn) == 200


def test_images_become_bytes() -> None:
    unit = torch.linspace(0, 1, 1024).reshape(1, 1, 32, 32)
    expected = (torch.linspace(0, 1, 1024) * 255).round().to(torch.uint8).reshape(1, 32, 32)
    assert torch.equal(unit_to_uint8(unit), expected)
    assert torch.equal(unit_to_uint8(expected), expected)
    small = unit_to_uint8(torch.ones(1, 28, 28))
    assert small.shape == (1, 32, 32) and small.sum() == 255 * 28 * 28


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full((1, 32, 32), float("nan")), "NaN"),
        (torch.full((1, 32, 32), -1.0), r"\[0, 1\]"),
        (torch.zeros(1, 3, 32, 32), "in grey"),
        (torch.zeros(1, 16, 16), "in grey"),
        (torch.zeros(1, 32, 32, dtype=torch.int64), "int64"),
    ],
)
def test_wrong_images_are_refused(images: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unit_to_uint8(images)


def test_images_from_a_file(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (6, 32, 32)).astype(np.uint8)
    np.save(tmp_path / "made.npy", images)
    found, labels = load_images(tmp_path / "made.npy")
    assert np.array_equal(found.numpy(), images) and labels is None
    np.save(tmp_path / "made.labels.npy", np.arange(6))
    labels = load_images(tmp_path / "made.npy")[1]
    assert labels is not None and labels.tolist() == [0, 1, 2, 3, 4, 5]
    for wrong in (np.arange(5), np.arange(6) + 5, np.arange(6) / 2):
        np.save(tmp_path / "made.labels.npy", wrong)
        with pytest.raises(ValueError, match="labels"):
            load_images(tmp_path / "made.npy")
    (tmp_path / "broken.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match="broken"):
        load_images(tmp_path / "broken.npy")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_images(tmp_path / "nowhere")


def test_images_from_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no \.png"):
        load_images(tmp_path)
    for folder, value in (("3", 10), ("ankle-boot", 20)):
        (tmp_path / folder).mkdir()
        Image.new("L", (32, 32), value).save(tmp_path / folder / "0.png")
    images, labels = load_images(tmp_path)
    assert images[:, 0, 0].tolist() == [10, 20]
    assert labels is not None and labels.tolist() == [3, 9]
    Image.new("L", (32, 32)).save(tmp_path / "loose.png")
    assert load_images(tmp_path)[1] is None
    Image.new("L", (64, 64)).save(tmp_path / "grid.png")
    with pytest.raises(ValueError, match="several sizes"):
        load_images(tmp_path)


def test_the_fingerprint_is_that_of_the_weights() -> None:
    a, b = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    b.load_state_dict(a.state_dict())
    assert weights_fingerprint(a) == weights_fingerprint(b)
    with torch.no_grad():
        b.bias[1] += 1e-6
    assert weights_fingerprint(a) != weights_fingerprint(b)
    assert weights_fingerprint(a.bfloat16()) != weights_fingerprint(b)


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


def test_evaluate(train: ImageDataset, test: ImageDataset) -> None:
    seen: list[str] = []
    result = evaluate(
        test.images,
        test.labels,
        train=train,
        test=test,
        classifier=load_classifier(),
        name="the test split itself",
        on_row=lambda row: seen.append(row.name),
    )
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == seen and len(rows) == 5
    for row in rows.values():
        assert row["count"] == 80 and row["reference"] == "test 80"
        assert row["extractor"] == result["extractor"] == load_classifier().fingerprint
    same = rows["the test split itself"]
    assert same[METRIC] == pytest.approx(0, abs=1e-6)
    assert (same["precision"], same["recall"]) == (1.0, 1.0)
    assert same["class_agreement"] == result["extractor_accuracy"]
    assert rows["train split"][METRIC] < 0.2 * rows["uniform noise"][METRIC]
    assert result["fd_over_floor"] == pytest.approx(0, abs=1e-4)
    assert json.loads(json.dumps(result)) == result

    unlabelled = Judge(load_classifier(), test).score("x", "samples", test.images, None)
    assert unlabelled.class_agreement is None
    with pytest.raises(ValueError, match="3 images are too few"):
        Judge(load_classifier(), test).score("x", "samples", test.images[:3], None)


def use(monkeypatch: pytest.MonkeyPatch, pipeline: StandIn) -> StandIn:
    monkeypatch.setattr(fastfar.FARPipeline, "from_pretrained", lambda name: pipeline)
    return pipeline


def test_command(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", "--data", str(files), "--samples", "40", "--batch-size", "16"]
    command += [
        "--work",
        str(tmp_path / "work"),
        "--output",
        str(tmp_path / "out" / "results.jsonl"),
    ]
    command += ["--guidance-scale", "2", "--diffusion-steps", "5", "--checkpoint", "runs/mine"]

    use(monkeypatch, StandIn(limit=1))
    assert cli.main(command) == 130
    output = capsys.readouterr()
    assert "16 of 40 samples finished" in output.err and output.out == ""

    pipeline = use(monkeypatch, StandIn())
    assert cli.main(command) == 0
    assert pipeline.batches == [16, 8]
    assert pipeline.calls[0] == {"guidance_scale": 2.0, "diffusion_steps": 5, "backend": "auto"}
    table = capsys.readouterr().out
    assert METRIC in table and "no ImageNet FID" in table and "test 80" in table
    assert table.splitlines()[1].startswith("mine ")

    pipeline = use(monkeypatch, StandIn(limit=0))
    assert cli.main([*command, "--json"]) == 0
    (printed,) = capsys.readouterr().out.splitlines()
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert len(lines) == 2 and lines[1] == printed
    first, second = (json.loads(line) for line in lines)
    assert first["rows"] == second["rows"], "the figures do not repeat"
    run = first["run"]
    assert run["new_samples"] == 24 and second["run"]["new_samples"] == 0
    assert run["plan"]["guidance_scale"] == 2.0 and set(run["plan"]["diffusion_steps"]) == {5}

    assert cli.main([*command, "--seed", "1"]) == 2
    assert "samples of another run (different: seed)" in capsys.readouterr().err


def test_command_with_images(
    files: Path, tmp_path: Path, test: ImageDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "made.npy", test.images.numpy())
    assert cli.main(["eval", "--data", str(files), "--images", str(tmp_path / "made.npy")]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith("made.npy") and "unknown" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", "3"], "--samples 3"),
        (["--seed", "-1"], "seed is -1"),
        (["--evaluator", "nowhere"], "no evaluator"),
        (["--images", "nowhere.npy"], "no images"),
        (["--data", "nowhere"], "dataset-fashion-mnist"),
    ],
)
def test_command_errors_come_first(
    files: Path,
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pipeline = use(monkeypatch, StandIn())
    assert cli.main(["eval", "--data", str(files), *options]) == 2
    assert message in capsys.readouterr().err
    assert pipeline.batches == []


def test_command_that_trains_the_evaluator(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", "train-classifier", "--to", str(tmp_path), "--data", str(files), "--json"]
    command += ["--epochs", "1", "--batch-size", "64", "--dtype", "float32"]
    assert cli.main(command) == 0
    found = json.loads(capsys.readouterr().out)
    stored = load_classifier(tmp_path)
    assert found["extractor"] == stored.fingerprint
    assert found["test_accuracy"] == accuracy(stored, load_fashion_mnist("test", files))
    training = json.loads((tmp_path / "config.json").read_text())["training"]
    assert training["epochs"] == 1 and len(training["loss_per_epoch"]) == 1
    assert training["test_accuracy"] == found["test_accuracy"]
