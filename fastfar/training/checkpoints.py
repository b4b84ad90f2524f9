"""Saves of a training run by torch.distributed.checkpoint: atomic, in the background, resharded.

    OUTPUT/checkpoints/step-000500/   tensors by name, one file a process, .metadata, run.json
    OUTPUT/checkpoints/latest.json    {"folder": "step-000500"}, written last

A save exists from the moment that latest.json names it; whatever ends before that leaves the one
before, which stays beside it. The tensors are saved by what they are called, so any number of
processes reads what any other wrote.
"""

from __future__ import annotations

import errno
import json
import pickle
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import StorageMeta

from fastfar._files import atomic_write
from fastfar.training.distributed import World

FOLDER = "checkpoints"
POINTER = "latest.json"
FACTS = "run.json"
RECIPE_FILE = "recipe.json"  # in the folder of the run: to be read by people, and by --recipe
# What .metadata may name; anything else could run code when it is read.
SAFE = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}


class Checkpoints:
    """Writes the saves of one run and keeps the last two.

    Args:
        folder: of the run, on a file system that all processes share.
        world: its processes, all of which call every method.
        asynchronous: write in the background, from a copy in the CPU's memory.
    """

    def __init__(self, folder: Path, world: World, asynchronous: bool = True) -> None:
        self.folder, self.world, self.asynchronous = folder, world, asynchronous
        self.step: int | None = None  # of the last save, be it still under way
        self._pending: tuple[Path, Future[Any]] | None = None

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Save tensors, and facts that JSON can hold ("recipe" among them); ends the save before.

        The step that was saved or loaded last is there already and is not written again.

        Raises:
            OSError: the disk is full or the folder cannot be written (in the background: `wait`
                raises it); the saves that were there are intact.
        """
        self.wait()
        if step == self.step:
            return
        path = self.folder / FOLDER / f"step-{step:06d}"
        _no_warning_of_one_process()
        try:
            writer = _Writer(path, facts)
            options = {"storage_writer": writer, "process_group": self.world.storage}
            if self.asynchronous:
                self._pending = path, dcp.async_save(dict(tensors), **options)
            else:
                dcp.save(dict(tensors), **options)
            self.step = step
        except (CheckpointException, OSError) as error:
            raise _as_os_error(error, path) from error

    def wait(self) -> None:
        """Wait for the save in the background; OSError if it failed."""
        if self._pending is None:
            return
        path, future = self._pending
        self._pending = None
        try:
            future.result()
        except (CheckpointException, OSError) as error:
            self.step = None
            raise _as_os_error(error, path) from error

    def load(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite tensors by those of a save, whichever processes wrote it.

        Raises:
            ValueError: it is damaged, or holds other tensors.
        """
        _load(path, dict(tensors), process_group=self.world.storage)


def latest(run: Path) -> Path | None:
    """The folder of a run's last save; None if there is none.

    Raises:
        ValueError: latest.json is damaged.
    """
    pointer = run / FOLDER / POINTER
    if not pointer.is_file():
        return None
    try:
        return pointer.parent / str(json.loads(pointer.read_text(encoding="utf-8"))["folder"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{pointer} is damaged ({error}); write {{\"folder\": \"step-...\"}} with a folder "
            "beside it into it, or delete it to start the run anew"
        ) from error


def read_facts(path: Path) -> dict[str, Any]:
    """What was given to `save` beside the tensors; ValueError if it is not there."""
    try:
        facts = json.loads((path / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    return dict(facts)


def read_tensors(path: Path, *prefixes: str) -> dict[str, Tensor]:
    """The tensors of a save whose names start with one of the prefixes, whole, on the CPU.

    Raises:
        ValueError: it is damaged.
    """
    known = _metadata(path).state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in known.items()
        if name.startswith(prefixes)
    }
    _load(path, tensors, no_dist=True)
    return tensors


class _Writer(dcp.FileSystemWriter):  # type: ignore[misc]
    """Makes the save the last one when all processes have written."""

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        super().__init__(path)
        self.recipe, self.facts = facts["recipe"], json.dumps(facts, indent=2) + "\n"

    def prepare_global_plan(self, plans: Any) -> Any:
        """Of the first process alone, before any writes: remove what a killed save left.

        In here, since an error of one process is one of all: they must not go on with different
        saves.
        """
        for left in Path(self.path).iterdir():
            left.unlink()
        return super().prepare_global_plan(plans)

    def storage_meta(self) -> Any:
        return StorageMeta(save_id=self.save_id)  # without the path, which is a class of its own

    def finish(self, metadata: Any, results: Any) -> None:
        """Of the first process alone."""
        super().finish(metadata, results)
        path = Path(self.path)
        with atomic_write(path / FACTS) as temporary:
            temporary.write_text(self.facts, encoding="utf-8")
        run = path.parent.parent
        before = latest(run)
        with atomic_write(run / RECIPE_FILE) as temporary:
            temporary.write_text(json.dumps(self.recipe, indent=2) + "\n", encoding="utf-8")
        with atomic_write(path.parent / POINTER) as temporary:
            temporary.write_text(json.dumps({"folder": path.name}) + "\n", encoding="utf-8")
        for other in path.parent.glob("step-*"):
            if other not in (path, before):
                shutil.rmtree(other, ignore_errors=True)


class _Reader(dcp.FileSystemReader):  # type: ignore[misc]
    """Reads .metadata, which is a pickle, without running code that is not PyTorch's own."""

    def read_metadata(self) -> Any:
        with (Path(self.path) / ".metadata").open("rb") as stream:
            metadata = _Unpickler(stream).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and (module, name) not in SAFE:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no save does")
        return super().find_class(module, name)


def _metadata(path: Path) -> Any:
    try:
        return _Reader(path).read_metadata()
    except Exception as error:  # whatever a damaged pickle makes Python do
        raise _damaged(path, error) from error


def _load(path: Path, tensors: dict[str, Tensor], **options: Any) -> None:
    _metadata(path)  # PyTorch prints a traceback where it is damaged
    _no_warning_of_one_process()
    try:
        dcp.load(tensors, storage_reader=_Reader(path), **options)
    except (CheckpointException, RuntimeError, ValueError, KeyError, AssertionError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: BaseException) -> ValueError:
    return ValueError(
        f"{path} is damaged or is no save of this run ({_first(error)}); name another folder of "
        f"{path.parent} in {POINTER}, or delete {path.parent} to start the run anew"
    )


def _first(error: BaseException) -> str:
    """What went wrong in the first process in which something did, in one line."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _as_os_error(error: BaseException, path: Path) -> OSError:
    """PyTorch's writer turns a failed write into errors of its own."""
    cause: BaseException | None = error
    if isinstance(error, CheckpointException) and error.failures:
        cause = next(iter(error.failures.values()))[0]
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    number, why = (cause.errno, cause.strerror) if cause else (errno.EIO, _first(error))
    return OSError(
        number,
        f"could not write {path}: {why}. The save before it is unchanged: free space or choose "
        "another folder, then save again",
    )


def _no_warning_of_one_process() -> None:
    """One process without a group is what was meant. Saves run in a thread, so no context."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")
