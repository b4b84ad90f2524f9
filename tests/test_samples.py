"""Where the judged images come from: resumable sampling, and files."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stand_in import StandIn

from fastfar.data import balanced_labels
from fastfar.evaluation import SampleStore, draw_samples, load_images
from fastfar.evaluation.files import image_batches
from fastfar.evaluation.samples import (
    fill,
    image_generator,
    read_chunks,
    unit_to_uint8,
    weights_fingerprint,
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
    assert new == 17 and again.batches == [1, 7, 7, 2], "batches begin at multiples of their size"
    assert seen == [(20, 37), (21, 37), (28, 37), (35, 37), (37, 37)]
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
    assert new == 20 and pipeline.batches == [5, 5, 10], "a batch must not run over a gap"
    assert torch.equal(again, whole)


def test_samples_of_another_run_are_not_mixed_in(tmp_path: Path) -> None:
    SampleStore(tmp_path, {"seed": 0, "weights": "abc"})
    SampleStore(tmp_path, {"seed": 0, "weights": "abc"})
    with pytest.raises(ValueError, match=r"another run .different: weights"):
        SampleStore(tmp_path, {"seed": 0, "weights": "abd"})
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        SampleStore(tmp_path, {"seed": 0})


def test_colour_and_many_classes(tmp_path: Path) -> None:
    store = SampleStore(tmp_path, {})
    pipeline = StandIn(shape=(3, 8, 8))
    whole, labels, _ = draw_samples(pipeline, 25, store, batch_size=10, num_classes=20)
    assert whole.shape == (25, 3, 8, 8) and torch.equal(labels, balanced_labels(25, 20))
    assert pipeline.labels == labels.tolist()
    draw_samples(StandIn(limit=0), 21, store, num_classes=20)
    np.save(tmp_path / "000025-000026.npy", np.zeros((1, 3, 9, 9), np.uint8))
    with pytest.raises(ValueError, match="different runs"):
        read_chunks(tmp_path, 26)


def test_samples_come_in_batches(tmp_path: Path) -> None:
    store = SampleStore(tmp_path, {})
    whole, _, _ = draw_samples(StandIn(), 30, store, batch_size=10)
    store.write(8, whole[8:13])  # another batch size has drawn these as well
    batches = list(store.batches(27, 4))
    assert max(map(len, batches)) == 4 and torch.equal(torch.cat(batches), whole[:27])
    (tmp_path / "000010-000020.npy").unlink()
    with pytest.raises(ValueError, match="lacks image 13 of 30"):
        list(SampleStore(tmp_path, {}).batches(30, 4))


def test_processes_share_the_samples(tmp_path: Path) -> None:
    whole, _, _ = draw_samples(StandIn(), 50, SampleStore(tmp_path / "one", {}), batch_size=4)
    folder = tmp_path / "three"
    stopped = StandIn(limit=4)  # its share are batches 1, 4, 7 and 10; then it would help
    with pytest.raises(KeyboardInterrupt):
        fill(stopped, 50, SampleStore(folder, {}), batch_size=4, share=(1, 3))
    images, there = read_chunks(folder, 50)
    assert stopped.batches == [4] * 4
    assert [i // 4 for i in torch.nonzero(there)[::4, 0].tolist()] == [1, 4, 7, 10]

    def two(rank: int) -> int:
        return fill(StandIn(), 50, SampleStore(folder, {}), batch_size=4, share=(rank, 3))

    with ThreadPoolExecutor() as pool:  # process 1 does not come back
        new = list(pool.map(two, (0, 2)))
    assert 34 <= sum(new) <= 34 + 2 * 3 * 4
    images, there = read_chunks(folder, 50)
    assert bool(there.all()) and torch.equal(images, whole)
    assert fill(StandIn(limit=0), 50, SampleStore(folder, {}), share=(4, 5)) == 0


def test_what_another_process_draws_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last batch comes while this one, which is done, waits: nothing is drawn twice."""
    whole, _, _ = draw_samples(StandIn(), 10, SampleStore(tmp_path / "other", {}), batch_size=5)
    store, pipeline = SampleStore(tmp_path / "shared", {}), StandIn()
    clock = itertools.count()  # a batch takes a second, and so does a look at the clock
    monkeypatch.setattr("fastfar.evaluation.samples.time.perf_counter", lambda: next(clock))
    monkeypatch.setattr("fastfar.evaluation.samples.time.monotonic", lambda: 0.0)
    monkeypatch.setattr(
        "fastfar.evaluation.samples.time.sleep", lambda seconds: store.write(5, whole[5:])
    )
    assert fill(pipeline, 10, store, batch_size=5, share=(0, 2)) == 5
    assert pipeline.batches == [5]


def test_bad_sampling_arguments(tmp_path: Path) -> None:
    store = SampleStore(tmp_path, {})
    with pytest.raises(ValueError, match="batch size is 0"):
        draw_samples(StandIn(), 10, store, batch_size=0)
    with pytest.raises(ValueError, match="number of images is 0"):
        draw_samples(StandIn(), 0, store)
    for share in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=rf"share {share[0]} of {share[1]}"):
            fill(StandIn(), 10, store, share=share)
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
    colour = unit.expand(2, 3, 32, 32)
    assert torch.equal(unit_to_uint8(colour), expected.expand(2, 3, 32, 32))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full((1, 32, 32), float("nan")), "NaN"),
        (torch.full((1, 32, 32), -1.0), r"\[0, 1\]"),
        (torch.zeros(1, 4, 32, 32), "in colour"),
        (torch.zeros(32, 32), "in grey"),
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
    np.save(tmp_path / "small.npy", np.full((1, 28, 28), 255, np.uint8))
    small = load_images(tmp_path / "small.npy")[0]
    assert small.shape == (1, 32, 32) and small.sum() == 255 * 28 * 28
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


def test_pictures_in_colour(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (5, 6, 7, 3)).astype(np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    batches = list(image_batches(tmp_path, size=2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    assert torch.equal(torch.cat(batches), expected)
    np.savez(tmp_path / "samples.npz", pixels)
    (batch,) = image_batches(tmp_path / "samples.npz")
    assert torch.equal(batch, expected)
    np.savez(tmp_path / "other.npz", mu=pixels)
    with pytest.raises(ValueError, match=r"other.npz: no images in it"):
        next(image_batches(tmp_path / "other.npz"))


def test_the_fingerprint_is_that_of_the_weights() -> None:
    a, b = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    b.load_state_dict(a.state_dict())
    assert weights_fingerprint(a) == weights_fingerprint(b)
    with torch.no_grad():
        b.bias[1] += 1e-6
    assert weights_fingerprint(a) != weights_fingerprint(b)
    assert weights_fingerprint(a.bfloat16()) != weights_fingerprint(b)
