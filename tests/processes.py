"""Functions run on several processes of one gloo group, forked from this one: nothing is imported
again."""

from __future__ import annotations

import multiprocessing
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 600  # after which a group hangs


def on_processes(
    size: int, function: Callable[..., Any], folder: Path, *arguments: Any
) -> list[Any]:
    """What function(*arguments) gives on each process, in order; None for one that died.

    The function's results must be what torch.save takes. An exception ends its process only.
    """
    context = multiprocessing.get_context("fork")
    shared = folder / f"group-{uuid.uuid4().hex}"
    shared.mkdir(parents=True)
    processes = [
        context.Process(target=_run, args=(rank, size, shared, function, arguments))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + SECONDS
    for process in processes:
        process.join(max(end - time.monotonic(), 0.1))
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
        process.join()
    assert not hanging, f"{len(hanging)} of {size} processes did not end"
    files = [shared / f"{rank}.pt" for rank in range(size)]
    return [torch.load(file, weights_only=True) if file.exists() else None for file in files]


def _run(
    rank: int, size: int, shared: Path, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{shared / 'store'}", rank=rank, world_size=size
        )
    result = function(*arguments)
    torch.save(result, shared / f"{rank}.pt")
    if size > 1:
        dist.destroy_process_group()
