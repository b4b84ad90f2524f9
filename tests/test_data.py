"""Fashion-MNIST from IDX files: what is read, and what is refused."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from idx import write_fashion_mnist, write_idx

from fastfar.data import (
    CLASS_NAMES,
    ImageDataset,
    balanced_labels,
    fashion_mnist,
    load_fashion_mnist,
    read_idx,
    to_float,
    to_uint8,
)


@pytest.mark.parametrize("compressed", [True, False])
def test_reads_both_splits_and_pads(tmp_path: Path, compressed: bool) -> None:
    raw = write_fashion_mnist(tmp_path, train=30, test=20, compressed=compressed)
    for split, count in (("train", 30), ("test", 20)):
        dataset = load_fashion_mnist(split, tmp_path)
        images, labels = raw[split]
        assert len(dataset) == count and dataset.num_classes == 10
        assert dataset.images.shape == (count, 32, 32) and dataset.images.dtype == torch.uint8
        assert dataset.labels.dtype == torch.int64
        assert np.array_equal(dataset.images[:, 2:-2, 2:-2].numpy(), images)
        assert np.array_equal(dataset.labels.numpy(), labels)
        inner = dataset.images[:, 2:-2, 2:-2].long().sum()
        assert dataset.images.long().sum() == inner > 0, "the border is not black"


def test_missing_files_say_where_and_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        load_fashion_mnist("train", tmp_path)
    message = str(caught.value)
    for part in (
        str(tmp_path),
        "train-images-idx3-ubyte.gz",
        "apt-get install dataset-fashion-mnist",
        "--data FOLDER",
    ):
        assert part in message
    monkeypatch.setattr(fashion_mnist, "DEFAULT_ROOTS", (tmp_path / "nowhere",))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_fashion_mnist("test")


def test_one_missing_file_is_named(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    load_fashion_mnist("train", tmp_path)
    with pytest.raises(FileNotFoundError, match="t10k-labels-idx1-ubyte"):
        load_fashion_mnist("test", tmp_path)


def test_unknown_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'validation'.*'test', 'train'"):
        load_fashion_mnist("validation", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "starts with nothing"),
        (b"\x89PNG\r\n\x1a\n" + bytes(20), "not an IDX file"),
        (bytes((0, 0, 13, 3)) + struct.pack(">3I", 1, 28, 28) + bytes(28 * 28), "not an IDX file"),
        (bytes((0, 0, 8, 1)) + struct.pack(">I", 12) + bytes(12), "3 dimension"),
        (bytes((0, 0, 8, 3)) + struct.pack(">3I", 2, 28, 28) + bytes(28 * 28), "truncated"),
        (bytes((0, 0, 8, 3)) + struct.pack(">3I", 1, 28, 28) + bytes(28 * 28 + 1), "truncated or"),
    ],
)
def test_damaged_image_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    write_fashion_mnist(tmp_path, compressed=False)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_fashion_mnist("train", tmp_path)
    assert "train-images-idx3-ubyte" in str(caught.value)


def test_damaged_gzip_is_refused(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte.gz"
    whole = file.read_bytes()
    damaged = [whole[: len(whole) // 2], b"not gzip at all", whole[:40] + bytes(40) + whole[80:]]
    for content in damaged:
        file.write_bytes(content)
        with pytest.raises(ValueError, match="damaged or truncated gzip"):
            load_fashion_mnist("train", tmp_path)


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path, train=20, compressed=False)
    labels = tmp_path / "train-labels-idx1-ubyte"
    write_idx(labels, np.zeros(19, np.uint8))
    with pytest.raises(ValueError, match=r"20 images but .* 19 labels"):
        load_fashion_mnist("train", tmp_path)
    write_idx(labels, np.full(20, 10, np.uint8))
    with pytest.raises(ValueError, match=r"label 10, expected 0\.\.9"):
        load_fashion_mnist("train", tmp_path)
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((20, 27, 28), np.uint8))
    with pytest.raises(ValueError, match=r"\(27, 28\) pixels"):
        load_fashion_mnist("train", tmp_path)


def test_an_empty_set_is_refused(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path, train=0)
    with pytest.raises(ValueError, match="no images"):
        load_fashion_mnist("train", tmp_path)


def test_read_idx_of_more_dimensions(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    write_idx(tmp_path / "a.gz", array)
    assert gzip.decompress((tmp_path / "a.gz").read_bytes())[:4] == bytes((0, 0, 8, 3))
    assert np.array_equal(read_idx(tmp_path / "a.gz", dims=3).numpy(), array)


def test_float_images_and_back() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    floats = to_float(images)
    assert floats.shape == (1, 1, 16, 16) and floats.dtype == torch.float32
    assert float(floats.min()) == -1.0 and float(floats.max()) == 1.0
    assert torch.equal(to_uint8(floats), images)
    assert to_uint8(floats * 3).max() == 255 and to_uint8(floats * 3).min() == 0


def test_wrong_image_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        to_float(torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match=r"\(4, 4\)"):
        to_float(torch.zeros(4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="shape"):
        to_uint8(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(torch.full((1, 1, 4, 4), float("nan")))


def dataset(per_class: int) -> ImageDataset:
    labels = torch.arange(10).repeat(per_class)
    images = torch.arange(10 * per_class)[:, None, None].expand(-1, 32, 32).to(torch.uint8)
    return ImageDataset(images, labels, CLASS_NAMES)


def test_balanced_draws_are_balanced_distinct_and_repeatable() -> None:
    whole = dataset(12)
    rows = whole.balanced_rows(43, seed=5)
    counts = torch.bincount(whole.labels[rows], minlength=10)
    assert counts.tolist() == [5, 5, 5, 4, 4, 4, 4, 4, 4, 4]
    assert len(rows.unique()) == 43
    assert torch.equal(rows, whole.balanced_rows(43, seed=5))
    assert not torch.equal(rows, whole.balanced_rows(43, seed=6))
    drawn = whole.balanced(43, seed=5)
    assert torch.equal(drawn.images, whole.images[rows])
    assert torch.equal(drawn.labels, whole.labels[rows])


def test_too_many_balanced_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"need 3 of class 0 .'t-shirt/top'., but there are 2"):
        dataset(2).balanced(21)
    with pytest.raises(ValueError, match="at least 1"):
        balanced_labels(0)
    assert balanced_labels(12).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


def test_the_real_data() -> None:
    try:
        test = load_fashion_mnist("test")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert len(test) == 10_000
    assert torch.bincount(test.labels).tolist() == [1000] * 10
    assert test.labels[:8].tolist() == [9, 2, 1, 1, 6, 1, 4, 6]
    assert abs(float(to_float(test.images).mean()) + 0.5608) < 1e-3
