"""FID and its kin: extractors, references and scores, with a stand-in for torch-fidelity's network,
and against torch-fidelity itself where it is installed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stand_in import StandIn
from torch import Tensor, nn

import fastfar
from fastfar import backend, cli
from fastfar.data import ImageDataset
from fastfar.evaluation import FeatureStatistics, frechet_distance, load_classifier
from fastfar.evaluation import inception as inception_module
from fastfar.evaluation.extractors import Extractor, embed_all
from fastfar.evaluation.inception import Inception
from fastfar.evaluation.metrics import inception_score, precision_recall
from fastfar.evaluation.reference import (
    _Sample,
    data_batches,
    read_reference,
    reference_of,
    write_reference,
)
from fastfar.evaluation.scores import score


class Network(nn.Module):
    """In place of Inception: 6 features of the mean colour, 5 classes."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.weight_CF = torch.load(path, weights_only=True)["weight"]

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        assert images_BCHW.dtype == torch.uint8 and images_BCHW.shape[1] == 3
        features_BF = torch.tanh(images_BCHW.float().mean((2, 3)) / 128 @ self.weight_CF)
        return features_BF, 4 * features_BF[:, :5]


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of weights for the stand-in network, which is put in place."""
    monkeypatch.setattr(inception_module, "package_reason", lambda name: None)
    monkeypatch.setattr(inception_module, "_network", Network)
    file = tmp_path / "weights.pth"
    torch.save({"weight": torch.randn(3, 6, generator=torch.Generator().manual_seed(0))}, file)
    return file


def pictures(count: int, seed: int = 0, shape: tuple[int, ...] = (3, 6, 6)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randint(40, 216, (count, *[1] * len(shape)), generator=generator)
    noise = torch.randint(-40, 40, (count, *shape), generator=generator)
    return (mean + noise).to(torch.uint8)


def files_of(folder: Path, **arrays: Any) -> Path:
    path = folder / "reference.npz"
    np.savez(path, **arrays)
    return path


# --- scores ----------------------------------------------------------------------------------


def test_inception_score_is_its_definition() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(60, 4)) * 3
    order = np.random.RandomState(7).permutation(60)
    scores = []
    for part in np.split(order, 3):
        p = np.exp(logits[part]) / np.exp(logits[part]).sum(1, keepdims=True)
        scores.append(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()))
    found = inception_score(logits, splits=3, seed=7)
    assert found == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-12)


def test_inception_score_of_sure_and_of_unsure_classes() -> None:
    sure = 1000.0 * np.eye(5)[np.arange(100) % 5]
    assert inception_score(sure, splits=1)[0] == pytest.approx(5)
    assert inception_score(np.zeros((100, 5)), splits=10) == pytest.approx((1, 0))
    with pytest.raises(ValueError, match="4 images in 5 parts"):
        inception_score(np.zeros((4, 5)), splits=5)
    with pytest.raises(ValueError, match="NaN"):
        inception_score(np.full((4, 5), np.nan), splits=2)


def test_scores_of_a_set(weights: Path) -> None:
    extractor = Inception(weights)
    real, made = pictures(80), pictures(50, seed=1) // 2
    reference = reference_of("photographs", extractor, [real[:30], real[30:]])
    found = score("mine", embed_all(extractor, [made], size=7), extractor, reference).to_dict()
    features = [extractor.embed(images)[0].double().numpy() for images in (real, made)]
    real_NF, made_NF = features
    expected = frechet_distance(FeatureStatistics.of(made_NF), FeatureStatistics.of(real_NF))
    assert found.pop("FD-inception") == pytest.approx(expected, rel=1e-4) and expected > 0.01
    assert (found.pop("precision"), found.pop("recall")) == precision_recall(real_NF, made_NF)
    logits = extractor.embed(made)[1].numpy()
    mean_and_deviation = (found.pop("inception_score"), found.pop("inception_score_deviation"))
    assert mean_and_deviation == inception_score(logits)
    assert found == {
        "name": "mine",
        "count": 50,
        "extractor": extractor.fingerprint,
        "reference": "photographs 80",
    }
    with pytest.raises(ValueError, match="10 images are too few for FD-inception"):
        score("x", embed_all(extractor, [made[:10]]), extractor, reference)
    with pytest.raises(ValueError, match="no images"):
        embed_all(extractor, [])


def test_any_extractor_will_do() -> None:
    """The package's own classifier is one."""
    extractor: Extractor = load_classifier()
    real = pictures(60, shape=(32, 32))
    reference = reference_of("real", extractor, [real])
    found = score("real", embed_all(extractor, [real]), extractor, reference)
    assert found.metric == "FD-fashion" and found.distance == pytest.approx(0, abs=1e-6)
    assert (found.precision, found.recall) == (1.0, 1.0)


# --- the network -----------------------------------------------------------------------------


def test_the_network_gets_colour(weights: Path) -> None:
    extractor = Inception(weights)
    grey = pictures(4, shape=(6, 6))
    for one, other in zip(
        extractor.embed(grey), extractor.embed(grey[:, None].expand(-1, 3, -1, -1)), strict=True
    ):
        assert torch.equal(one, other)
    for wrong in (torch.zeros(2, 4, 6, 6, dtype=torch.uint8), torch.zeros(2, 3, 6, 6)):
        with pytest.raises(ValueError, match="Inception takes uint8"):
            extractor.embed(wrong)


def test_only_the_published_weights_give_a_fid(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extractor = Inception(weights)
    assert extractor.metric == "FD-inception"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert extractor.fingerprint == f"inception {digest[:12]}"
    monkeypatch.setattr(inception_module, "_PUBLISHED", digest)
    assert Inception(weights).metric == "FID"
    torch.save({"weight": torch.ones(3, 6)}, weights)
    assert Inception(weights).fingerprint != extractor.fingerprint


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("code in the file was run",))


def test_bad_weights_are_refused(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"fastfar downloads nothing"):
        Inception(weights.with_name("other.pth"))
    for content in ({"weight": Evil()}, {"other": torch.zeros(1)}):
        torch.save(content, weights)
        with pytest.raises(ValueError, match=r"holds no weights of torch-fidelity's Inception"):
            Inception(weights)
    weights.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="holds no weights"):
        Inception(weights)
    monkeypatch.setattr(inception_module, "package_reason", lambda name: f"{name} is not installed")
    with pytest.raises(ValueError, match="torch_fidelity is not installed"):
        Inception(weights)


# --- references ------------------------------------------------------------------------------


def test_published_statistics(weights: Path, tmp_path: Path) -> None:
    extractor = Inception(weights)
    mean, factor = np.arange(6.0), np.random.default_rng(0).normal(size=(6, 6))
    covariance = factor @ factor.T
    file = files_of(tmp_path, mu=mean.astype(np.float32), sigma=covariance)
    reference = read_reference(file, extractor)
    assert np.array_equal(reference.statistics.mean, mean) and reference.features is None
    assert np.array_equal(reference.statistics.covariance, covariance)
    assert str(reference) == "reference.npz", "the number of images is not known"
    found = score("x", embed_all(extractor, [pictures(20)]), extractor, reference)
    assert found.precision is None and found.recall is None and found.distance > 0


def test_a_reference_batch(weights: Path, tmp_path: Path) -> None:
    """Statistics of many images, and fewer images for precision and recall."""
    extractor = Inception(weights)
    images = pictures(15)
    array = images.permute(0, 2, 3, 1).numpy()
    mean, covariance = np.full(6, 0.5), np.eye(6)
    file = files_of(tmp_path, arr_0=array, mu=mean, sigma=covariance, mu_s=mean, sigma_s=covariance)
    reference = read_reference(file, extractor)
    expected = embed_all(extractor, [images]).features
    assert np.array_equal(reference.statistics.mean, mean)
    assert reference.features is not None and np.allclose(reference.features, expected)
    assert str(reference) == "reference.npz (15 for P, R)"

    reference = read_reference(files_of(tmp_path, arr_0=array), extractor)
    assert np.allclose(reference.statistics.mean, expected.mean(0), atol=1e-6)
    assert str(reference) == "reference.npz 15"


def test_rows_for_precision_are_any_of_all() -> None:
    """Fewer than asked are kept as they are; of more, each is as likely as any other."""
    few = _Sample(50)
    for rows in np.split(np.arange(40.0)[:, None], 4):
        few.add(rows)
    assert few.rows[:, 0].tolist() == list(range(40))
    sample = _Sample(1000)
    for rows in np.array_split(np.arange(20_000.0)[:, None], 13):  # the first 1,538: full and over
        sample.add(rows)
    kept = sample.rows[:, 0]
    assert len(kept) == len(set(kept.tolist())) == 1000
    counts = np.histogram(kept, bins=10, range=(0, 20_000))[0]
    assert counts.min() > 60 and counts.max() < 140, "four standard deviations of 100 are 38"


def test_a_reference_of_ones_own(weights: Path, tmp_path: Path) -> None:
    extractor = Inception(weights)
    images = pictures(15)
    data = ImageDataset(images, torch.zeros(15, dtype=torch.int64), ("thing",))
    assert torch.equal(torch.cat(list(data_batches(data, size=4))), images)
    reference = reference_of("things", extractor, data_batches(data))
    file = tmp_path / "out" / "things.npz"
    write_reference(file, reference, extractor)
    again = read_reference(file, extractor)
    assert str(again) == "things.npz 15" and again.features is not None
    assert np.array_equal(again.features, reference.features)
    assert frechet_distance(again.statistics, reference.statistics) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="holds features of 'inception"):
        read_reference(file, load_classifier())


def test_bad_references_are_refused(weights: Path, tmp_path: Path) -> None:
    extractor = Inception(weights)
    with pytest.raises(FileNotFoundError, match="VIRTUAL_imagenet256_labeled"):
        read_reference(tmp_path / "none.npz", extractor)
    wrong = [
        ({"mean": np.zeros(6)}, r"holds \['mean'\]: expected mu and sigma"),
        ({"mu": np.zeros(6), "sigma": np.zeros(6)}, r"expected \(F,\) and \(F, F\)"),
        ({"mu": np.full(6, np.nan), "sigma": np.eye(6)}, "NaN"),
        ({"arr_0": np.zeros((2, 3, 3), np.uint8)}, "arr_0 has shape"),
    ]
    for arrays, message in wrong:
        with pytest.raises(ValueError, match=message):
            read_reference(files_of(tmp_path, **arrays), extractor)
    narrow = read_reference(files_of(tmp_path, mu=np.zeros(5), sigma=np.eye(5)), extractor)
    with pytest.raises(ValueError, match="widths differ: 6 and 5"):
        score("x", embed_all(extractor, [pictures(20)]), extractor, narrow)
    for content in (b"", b"PK\x03\x04 no archive", b"something else"):
        (tmp_path / "reference.npz").write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            read_reference(tmp_path / "reference.npz", extractor)


# --- the command -----------------------------------------------------------------------------


@pytest.fixture
def colour(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    pipeline = StandIn(shape=(3, 8, 8))
    monkeypatch.setattr(fastfar.FARPipeline, "from_pretrained", lambda name: pipeline)
    yield pipeline


def test_command(
    weights: Path, colour: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", "--checkpoint", "mine", "--samples", "40", "--work", str(tmp_path / "work")]
    assert cli.main(command) == 2
    assert "images of shape (3, 8, 8)" in capsys.readouterr().err
    command += ["--inception", str(weights)]
    assert cli.main(command) == 2
    assert "--inception needs --reference" in capsys.readouterr().err and not colour.batches

    array = pictures(30, shape=(8, 8, 3)).numpy()
    command += ["--reference", str(files_of(tmp_path, arr_0=array))]
    assert cli.main(command) == 0
    table = capsys.readouterr().out
    assert "this is no FID" in table and "reference.npz 30" in table and "40" in table
    assert "Published figures are of 50,000 samples" in table
    assert cli.main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    (row,) = result["rows"]
    assert row["count"] == 40 and row["extractor"] == result["extractor"]
    assert result["run"]["mine"]["new_samples"] == 0 and sum(colour.batches) == 40

    # The same images from a file are judged alike.
    images = [np.load(file) for file in sorted((tmp_path / "work").glob("*.npy"))]
    np.savez(tmp_path / "samples.npz", np.concatenate(images).transpose(0, 2, 3, 1))
    assert cli.main([*command, "--images", str(tmp_path / "samples.npz"), "--json"]) == 0
    (same,) = json.loads(capsys.readouterr().out)["rows"]
    assert {**same, "name": "mine"} == row


def test_command_with_real_images(
    weights: Path, colour: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A data set as reference, kept for the next time."""
    from PIL import Image

    for i, picture in enumerate(pictures(12, shape=(16, 16, 3)).numpy()):
        folder = tmp_path / "real" / f"class {i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"{i}.png")
    command = ["eval", "--checkpoint", "mine", "--samples", "20", "--work", str(tmp_path / "work")]
    command += ["--inception", str(weights), "--json"]
    assert cli.main([*command, "--reference", str(tmp_path / "nothing")]) == 2
    assert "nothing" in capsys.readouterr().err and not colour.batches
    kept = tmp_path / "real.npz"
    options = ["--reference", str(tmp_path / "real"), "--save-reference", str(kept)]
    assert cli.main([*command, *options]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["reference"] == "real 12" and first["rows"][0]["recall"] is not None
    assert cli.main([*command, "--reference", str(kept)]) == 0
    second = json.loads(capsys.readouterr().out)
    assert second["rows"][0]["FD-inception"] == first["rows"][0]["FD-inception"]


# --- torch-fidelity itself -------------------------------------------------------------------

TORCH_FIDELITY = backend.package_reason("torch_fidelity")
needs_torch_fidelity = pytest.mark.skipif(
    TORCH_FIDELITY is not None, reason=f"torch-fidelity: {TORCH_FIDELITY}"
)


@needs_torch_fidelity
def test_figures_are_those_of_torch_fidelity() -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric

    rng = np.random.default_rng(0)
    real, made = rng.normal(size=(200, 12)), rng.normal(size=(150, 12)) * 0.8 + 0.3
    theirs = [fid_features_to_statistics(torch.from_numpy(rows)) for rows in (made, real)]
    fid = fid_statistics_to_metric(*theirs, False)["frechet_inception_distance"]
    ours = [FeatureStatistics.of(rows) for rows in (made, real)]
    assert frechet_distance(*ours) == pytest.approx(fid, rel=1e-9)
    logits = torch.from_numpy(rng.normal(size=(333, 9)) * 2)
    found = isc_features_to_metric(logits)
    assert inception_score(logits.numpy()) == pytest.approx(tuple(found.values()), rel=1e-9)


@needs_torch_fidelity
def test_the_network_is_that_of_torch_fidelity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With random weights, made here: the published ones are the user's."""
    from torch_fidelity import FeatureExtractorInceptionV3 as Network

    monkeypatch.setattr(
        "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url",
        lambda *args, **kwargs: pytest.fail("a download"),
    )
    file = tmp_path / "random.pth"
    torch.manual_seed(0)
    monkeypatch.setattr(
        Network, "load_state_dict", lambda self, state: torch.save(self.state_dict(), file)
    )
    torch.save({}, file)
    network = Network("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(file))
    monkeypatch.undo()
    extractor = Inception(file)
    images = pictures(3, shape=(3, 32, 32))
    features_BF, logits_BK = extractor.embed(images)
    assert features_BF.shape == (3, 2048) and logits_BK.shape == (3, 1008)
    assert torch.equal(features_BF, network(images)[0])
    assert features_BF.std(dim=0).max() > 0
