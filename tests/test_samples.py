"""Where the judged images come from: resumable sampling, and files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stand_in import StandIn

from fastfar.data import balanced_labels
from fastfar.evaluation import SampleStore, draw_samples, load_images
from fastfar.evaluation.samples import image_generator, unit_to_uint8, weights_fingerprint


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
    with pytest.raises(ValueError, match=r"another run .different: weights"):
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
