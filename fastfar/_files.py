"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path in the folder of `path`; on success it becomes `path` in one step.

    The body writes the temporary file. Leaving the block flushes it to the disk (fsync) and renames
    it over `path` (os.replace), so `path` holds either the old content or the new one, whole, even
    after a crash. If the body or the flush raises, the temporary file is removed, `path` is
    untouched and the error goes on; an OSError (disk full, no permission) is raised again with the
    same errno and a message that says so. The folder is made if it does not exist.

        with atomic_write("out/state.pt") as temporary:
            torch.save(state, temporary)
    """
    with atomic_writes(path) as (temporary,):
        yield temporary


@contextlib.contextmanager
def atomic_writes(*paths: str | os.PathLike[str]) -> Iterator[tuple[Path, ...]]:
    """`atomic_write` of several files: none is replaced before all are whole on the disk."""
    targets = [Path(path) for path in paths]
    tag = f"{os.getpid()}.{secrets.token_hex(4)}.tmp"
    temporaries = tuple(target.with_name(f".{target.name}.{tag}") for target in targets)
    try:
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
        # The rights of an ordinary new file: some writers (safetensors) make theirs private.
        temporaries[0].touch(exist_ok=False)
        mode = temporaries[0].stat().st_mode
        temporaries[0].unlink()
        yield temporaries
        for temporary in temporaries:
            temporary.chmod(mode)
            _flush(temporary)
        for temporary, target in zip(temporaries, targets, strict=True):
            os.replace(temporary, target)
        if os.name != "nt":  # Windows cannot open a folder; a rename there needs no flush of ours
            for folder in {target.parent for target in targets}:
                _flush(folder)
    except OSError as error:
        names = ", ".join(str(target) for target in targets)
        raise OSError(
            error.errno,
            f"could not write {names}: {error.strerror or error}. What was there before is "
            "unchanged: free space or choose another folder, then save again",
        ) from error
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
