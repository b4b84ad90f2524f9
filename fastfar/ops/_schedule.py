"""In which order, and on which of two branches, the launches of a denoising loop run.

The modulations of a diffusion step do not depend on x. So those of a chunk of steps are one large
product, which may run beside the serial chain of the chunk before it: on a second branch, into the
other one of two buffers. The order is data, so that a test can look for hazards.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

MODULATE, STEP = "modulate", "step"


@dataclass(frozen=True)
class Item:
    """One entry: the modulations of chunk `index`, or diffusion step `index`.

    Attributes:
        kind: MODULATE or STEP.
        index: of the chunk, or of the step in the order of sampling.
        slot: the buffer of modulations that it writes (MODULATE) or reads (STEP).
        branch: 0 is the serial chain, 1 the modulations ahead of it; a branch runs in order.
        after: positions of entries of the other branch that must have ended before.
    """

    kind: str
    index: int
    slot: int
    branch: int
    after: tuple[int, ...] = ()


def schedule(steps: int, chunk: int, branches: int = 1) -> list[Item]:
    """All entries of a loop of `steps` steps, in the order in which they are launched.

    With one branch there is one buffer: modulations, their steps, the next modulations. With two
    branches there are two, and the modulations run one chunk ahead.
    """
    chunks = -(-steps // chunk)
    items: list[Item] = []
    modulated: dict[int, int] = {}  # chunk -> position of its modulations
    last_step: dict[int, int] = {}  # chunk -> position of its last step

    def modulate(index: int) -> None:
        after: tuple[int, ...] = ()
        if branches == 2 and index - branches in last_step:
            after = (last_step[index - branches],)  # the slot's former content has been read
        modulated[index] = len(items)
        items.append(Item(MODULATE, index, index % branches, branches - 1, after))

    modulate(0)
    for index in range(chunks):
        if branches == 2 and index + 1 < chunks:
            modulate(index + 1)
        for step in range(index * chunk, min((index + 1) * chunk, steps)):
            first = step == index * chunk and branches == 2
            after = (modulated[index],) if first else ()
            last_step[index] = len(items)
            items.append(Item(STEP, step, index % branches, 0, after))
        if branches == 1 and index + 1 < chunks:
            modulate(index + 1)
    return items


_own = threading.local()


def _chain_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of high priority of this thread: one that is being captured is nobody else's."""
    streams: dict[torch.device, torch.cuda.Stream] = _own.__dict__.setdefault("streams", {})
    if device not in streams:
        stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        streams[device] = stream
    return streams[device]


def run(items: Sequence[Item], execute: Callable[[Item], None], device: torch.device) -> None:
    """Execute all entries on the current stream, or with two branches on this and another one.

    The chain of steps then has the other stream, of high priority: its small products must not
    wait behind the large ones. It forks from the current stream and joins it again, so this can be
    captured in a CUDA graph, which keeps the priorities.
    """
    if all(item.branch == 0 for item in items):
        for item in items:
            execute(item)
        return
    main = torch.cuda.current_stream(device)
    chain = _chain_stream(main.device)
    streams = (chain, main)
    chain.wait_stream(main)
    awaited = {position for item in items for position in item.after}
    done: dict[int, torch.cuda.Event] = {}
    for position, item in enumerate(items):
        stream = streams[item.branch]
        for other in item.after:
            stream.wait_event(done[other])
        with torch.cuda.stream(stream):
            execute(item)
        if position in awaited:
            done[position] = stream.record_event()
    main.wait_stream(chain)
