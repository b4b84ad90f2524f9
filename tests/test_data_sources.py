"""Pictures from folders, shards and saved datasets: the same ones, in a known order, named when
they are damaged."""

from __future__ import annotations

import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from idx import write_fashion_mnist
from pictures import CLASSES, encoded, picture, write_class_folders, write_shards, write_tar
from PIL import Image

from fastfar.data import Batches, Examples, Pictures, Transform, load_fashion_mnist, open_data

ROWS = torch.arange(9)


@pytest.fixture
def folders(tmp_path: Path) -> Examples:
    write_class_folders(tmp_path / "folders")
    return open_data(tmp_path / "folders", size=8)


# --- the transform ---------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (16, 16), (17, 100), (6, 5), (33, 31)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_transform_gives_squares(shape: tuple[int, int], mode: str) -> None:
    pixels = Transform(16, mode)(picture(0, *shape))
    assert pixels.shape == (3 if mode == "RGB" else 1, 16, 16) and pixels.dtype == torch.uint8
    assert len(pixels.unique()) > 20 or min(shape) < 10


def test_the_crop_is_the_middle() -> None:
    array = np.zeros((8, 24, 3), np.uint8)
    array[:, 8:16] = (10, 20, 30)
    middle = Transform(8)(Image.fromarray(array))
    assert all(set(plane.unique().tolist()) == {10 * c} for c, plane in enumerate(middle, 1))


def test_large_pictures_are_averaged_not_sampled() -> None:
    """A fine checkerboard becomes grey: halving takes the mean of all pixels."""
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    grey = Transform(8, "L")(Image.fromarray(board))
    assert int(grey.min()) >= 126 and int(grey.max()) <= 129


def test_transforms_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 pixel"):
        Transform(0)
    with pytest.raises(ValueError, match=r"'RGB', 'L'.*'CMYK'"):
        Transform(8, "CMYK")


# --- folders ---------------------------------------------------------------------------------


def test_class_folders_in_the_order_of_their_names(folders: Examples) -> None:
    assert folders.class_names == CLASSES and folders.image_shape == (3, 8, 8)
    assert folders.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and len(folders) == 9
    images, labels = folders.take(torch.tensor([7, 0]))
    for image, number in zip(images, (7, 0), strict=True):
        assert torch.equal(image, Transform(8)(picture(number)).float() / 127.5 - 1)
    assert labels.tolist() == [2, 0]


def test_hidden_folders_are_none_and_a_class_needs_a_picture(tmp_path: Path) -> None:
    for name in ("cat", "cat/.thumbs", "dog"):
        (tmp_path / name).mkdir()
    for name in ("cat/1.png", "cat/.thumbs/2.png", "dog/3.png"):
        picture(0).save(tmp_path / name)
    assert open_data(tmp_path, size=8).labels.tolist() == [0, 1]
    (tmp_path / "dog" / "3.png").unlink()
    with pytest.raises(ValueError, match=r"classes without a picture .*\['dog'\]"):
        open_data(tmp_path, size=8)


def test_a_folder_of_pictures_is_one_class(tmp_path: Path) -> None:
    folder = tmp_path / "flat"
    folder.mkdir()
    for number in range(3):
        picture(number).save(folder / f"{number}.png")
    (folder / "notes.txt").write_text("no picture")
    found = open_data(folder, size=8)
    assert found.class_names == ("flat",) and found.labels.tolist() == [0, 0, 0]
    for number in range(3):
        (folder / f"{number}.png").unlink()
    with pytest.raises(ValueError, match="no data set that fastfar knows"):
        open_data(folder, size=8)


def test_flips_are_of_the_rows_asked(folders: Examples) -> None:
    plain, _ = folders.take(ROWS[:2])
    flipped, _ = folders.take(ROWS[:2], torch.tensor([False, True]))
    assert torch.equal(flipped[0], plain[0]) and torch.equal(flipped[1], plain[1].flip(-1))
    assert not torch.equal(flipped[1], plain[1])


def test_statistics_are_those_of_what_is_given(folders: Examples) -> None:
    images, _ = folders.take(ROWS)
    mean, std = folders.pixel_statistics()
    assert mean == pytest.approx(float(images.double().mean()), abs=1e-6)
    assert std == pytest.approx(float(images.double().std()), abs=1e-6)


def test_identity_tells_data_and_transform_apart(folders: Examples, tmp_path: Path) -> None:
    root = tmp_path / "folders"
    assert open_data(root, size=8).identity == folders.identity
    assert open_data(root, size=9).identity != folders.identity
    assert open_data(root, size=8, mode="L").identity != folders.identity
    (root / "ant" / "0.png").write_bytes(encoded(77) + b"longer")
    assert open_data(root, size=8).identity != folders.identity


def test_nested_pictures_splits_and_other_files(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "train", 2)
    write_class_folders(tmp_path / "val", 1)
    deep = tmp_path / "train" / "bee" / "more" / "deep"
    deep.mkdir(parents=True)
    (deep / "x.PNG").write_bytes(encoded(50))
    (tmp_path / "train" / "bee" / "notes.txt").write_text("no picture")
    (tmp_path / "train" / ".hidden").mkdir()
    assert open_data(tmp_path, size=8).labels.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert len(open_data(tmp_path, size=8, split="val")) == 3
    with pytest.raises(ValueError, match=r"splits \['train', 'val'\], not 'test'"):
        open_data(tmp_path, size=8, split="test")


def test_a_damaged_picture_is_named(folders: Examples, tmp_path: Path) -> None:
    path = tmp_path / "folders" / "bee" / "1.png"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"nothing"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"bee/1\.png cannot be read as a picture"):
            folders.take(torch.tensor([4]))
    folders.take(torch.tensor([3]))


def test_pictures_go_through_worker_processes(folders: Examples) -> None:
    again = pickle.loads(pickle.dumps(folders))
    assert torch.equal(again.take(ROWS)[0], folders.take(ROWS)[0])
    with Batches(folders, lambda step: (ROWS[step % 9 :],), workers=1) as batches:
        for step in range(3):
            assert torch.equal(next(batches)[0], folders.take(ROWS[step:])[0])


# --- shards ----------------------------------------------------------------------------------


def test_shards_hold_the_same_pictures(folders: Examples, tmp_path: Path) -> None:
    write_shards(tmp_path)
    for spec in (tmp_path, tmp_path / "part-*.tar"):
        shards = open_data(spec, size=8)
        assert shards.class_names == CLASSES
        order = torch.tensor([8, 0, 5, 4])
        for found, expected in zip(shards.take(order), folders.take(order), strict=True):
            assert torch.equal(found, expected)
    assert len(open_data(tmp_path / "part-1.tar", size=8)) == 4
    assert shards.identity == open_data(tmp_path, size=8).identity != folders.identity


def test_shards_that_webdataset_wrote(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="pip install webdataset")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number in range(4):
            writer.write({"__key__": f"x/{number}", "png": picture(number), "cls": 3 - number})
    shards = open_data(tmp_path, size=8)
    assert shards.labels.tolist() == [3, 2, 1, 0] and shards.class_names == ("0", "1", "2", "3")
    expected = torch.stack([Transform(8)(picture(number)) for number in range(4)])
    assert torch.equal(shards.take(torch.arange(4))[0], expected.float() / 127.5 - 1)


def test_labels_in_json_and_names_with_dots(tmp_path: Path) -> None:
    files = [
        ("a.b/n1.seg.png", encoded(1)),
        ("a.b/n1.json", b'{"label": 2, "caption": "x"}'),
        ("a.b/n2.json", b'{"caption": "y"}'),
        ("a.b/n2.jpg", encoded(2)),
        ("a.b/n2.cls", b"1\n"),
    ]
    write_tar(tmp_path / "a.tar", files)
    assert open_data(tmp_path, size=8).labels.tolist() == [2, 1]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("a.png", b"")], r"sample 'a' has no label"),
        ([("a.cls", b"1")], r"sample 'a' has no picture"),
        ([("a.png", b""), ("a.cls", b"cat")], r"a\.cls holds b'cat', not a class number"),
        ([("a.png", b""), ("a.cls", b"-1")], "not a class number"),
        ([("a.png", b""), ("a.json", b'{"label": "cat"}')], "not a class number"),
        ([("a.png", b""), ("a.cls", b"7")], r"names 3 classes, but there is a label 7"),
        ([], "no sample"),
    ],
)
def test_wrong_shards_are_refused(
    tmp_path: Path, files: list[tuple[str, bytes]], message: str
) -> None:
    write_tar(tmp_path / "a.tar", files)
    (tmp_path / "classes.txt").write_text("x\ny\nz\n")
    with pytest.raises(ValueError, match=message):
        open_data(tmp_path, size=8)


def test_truncated_shards_are_refused(tmp_path: Path) -> None:
    write_shards(tmp_path)
    path = tmp_path / "part-0.tar"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"part-0\.tar"):
        open_data(tmp_path, size=8).take(ROWS)
    path.write_bytes(b"no tar file at all" * 100)
    with pytest.raises(ValueError, match=r"part-0\.tar is not a whole, uncompressed tar file"):
        open_data(tmp_path, size=8)


# --- Hugging Face's datasets -----------------------------------------------------------------


class Saved:
    """What fastfar asks of a `datasets.Dataset`."""

    _fingerprint = "0123456789abcdef"

    def __init__(self, features: dict[str, Any], columns: dict[str, list[Any]]) -> None:
        self.features, self.columns = features, columns

    def __getitem__(self, key: str | int) -> Any:
        if isinstance(key, str):
            return self.columns[key]
        return {name: column[key] for name, column in self.columns.items()}


def feature(kind: str, **entries: Any) -> Any:
    return type(kind, (), entries)()


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A stand-in for the package, so that our side is tested without it: set what it loads."""
    (tmp_path / "dataset_info.json").write_text("{}")
    columns = {"pic": [picture(number) for number in range(4)], "kind": [2, 0, 1, 1]}
    features = {"pic": feature("Image"), "kind": feature("ClassLabel", names=list(CLASSES))}
    loaded: dict[str, Any] = {"data": Saved(features, columns)}
    module = types.ModuleType("datasets")
    module.load_from_disk = lambda path: loaded["data"]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return loaded


def test_saved_datasets(saved: dict[str, Any], tmp_path: Path) -> None:
    data = open_data(tmp_path, size=8)
    assert data.class_names == CLASSES and data.labels.tolist() == [2, 0, 1, 1]
    expected = torch.stack([Transform(8)(picture(number)) for number in (3, 0)])
    assert torch.equal(data.take(torch.tensor([3, 0]))[0], expected.float() / 127.5 - 1)
    saved["data"] = {"train": saved["data"]}
    assert open_data(tmp_path, size=8).identity == data.identity
    with pytest.raises(ValueError, match=r"splits \['train'\], not 'test'"):
        open_data(tmp_path, size=8, split="test")


def test_saved_datasets_without_what_is_needed(saved: dict[str, Any], tmp_path: Path) -> None:
    whole = saved["data"]
    saved["data"] = Saved({"kind": whole.features["kind"]}, whole.columns)
    with pytest.raises(ValueError, match=r"column of type Image .*'kind': 'ClassLabel'"):
        open_data(tmp_path, size=8)
    numbers = {"pic": feature("Image"), "label": feature("Value")}
    saved["data"] = Saved(numbers, {**whole.columns, "label": [0, 1, None, 1]})
    with pytest.raises(ValueError, match="whole numbers from 0"):
        open_data(tmp_path, size=8)
    saved["data"] = Saved(numbers, {**whole.columns, "label": [0, 1, 4, 1]})
    assert open_data(tmp_path, size=8).class_names == ("0", "1", "2", "3", "4")


def test_without_the_package_it_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "dataset_dict.json").write_text("{}")
    with pytest.raises(ImportError, match=r"pip install 'fastfar\[data\]'"):
        open_data(tmp_path, size=8)


def test_a_dataset_that_the_package_saved(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="pip install 'fastfar[data]'")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    )
    columns = {"image": [picture(number) for number in range(4)], "label": [2, 0, 1, 1]}
    whole = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict({"train": whole}).save_to_disk(str(tmp_path / "dict"))
    whole.save_to_disk(str(tmp_path / "one"))
    for name in ("dict", "one"):
        data = open_data(tmp_path / name, size=8)
        assert data.class_names == CLASSES and data.labels.tolist() == [2, 0, 1, 1]
        expected = torch.stack([Transform(8)(picture(number)) for number in range(4)])
        again = pickle.loads(pickle.dumps(data))
        for each in (data, again):
            assert torch.equal(each.take(torch.arange(4))[0], expected.float() / 127.5 - 1)
        assert data.identity == open_data(tmp_path / name, size=8).identity


# --- one name for all ------------------------------------------------------------------------


def test_idx_folders_are_opened(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    data, expected = open_data(tmp_path), load_fashion_mnist("train", tmp_path)
    assert data.identity == expected.identity
    assert open_data(tmp_path, split="test").identity != expected.identity


def test_what_is_no_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no .*nowhere"):
        open_data(tmp_path / "nowhere", size=8)
    with pytest.raises(FileNotFoundError, match="pattern"):
        open_data(tmp_path / "part-*.tar", size=8)
    with pytest.raises(ValueError, match=r"looked for IDX files, .*\.tar shards"):
        open_data(tmp_path, size=8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no class folders with pictures"):
        open_data(tmp_path, size=8)


def test_pictures_need_a_size(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    with pytest.raises(ValueError, match="to which size"):
        open_data(tmp_path)
    assert isinstance(open_data(tmp_path, size=8), Pictures)
