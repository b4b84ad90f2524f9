"""GPUs as training sees them: how much memory each has, and what joins them.

Marks as in `gpus.py`. Sources:
    memory   what PyTorch reports: H100 79.2 GiB [measured]; others [assumed] from the size that the
             maker gives, less what driver and error correction keep
    link     bytes/s from a GPU to the others of its node, one way: half of NVLink's figure
             [data sheet]; RTX 4090: PCIe 4 through the host's memory [assumed]
    network  bytes/s from a GPU to other nodes: a 400 Gb/s card each, 200 Gb/s on A100 nodes
             [data sheet of the maker's own nodes], 100 Gb/s beside RTX 4090s [assumed]
    LINK_SHARE  NCCL reaches 370 of 450 GB/s on H100s by rings; NVLink SHARP, which is faster, is
             left out [published: NVIDIA in NVIDIA/nccl-tests issue 212]; 475 GB/s is measured with
             it on H200s (issue 272), 208 of 300 GB/s on A100s (issue 178)
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from fastfar.costs import gpus
from fastfar.costs.gpus import GPU

LINK_SHARE = 0.82
HOST_COPY = 8e9  # bytes/s of a copy to the host's pageable memory [assumed]
HOST_MEMORY = 30e9  # bytes/s that a process moves in the host's memory [assumed]
COLLECTIVE = 30e-6  # seconds that a collective takes at least [assumed]
PER_NODE = 8


@dataclass(frozen=True)
class Machine:
    """So many equal GPUs.

    Attributes:
        gpu: its figures.
        count: of all nodes, `PER_NODE` on each but the last.
        memory: bytes of one GPU that a process can get.
        link, network: bytes/s, see above.
    """

    gpu: GPU
    count: int
    memory: float
    link: float
    network: float

    @property
    def title(self) -> str:
        """As in "8 x H100 SXM (79.2 GiB each)"."""
        nodes = math.ceil(self.count / PER_NODE)
        where = f" in {nodes} nodes" if nodes > 1 else ""
        return f"{self.count} x {self.gpu.title} ({self.memory / 2**30:.1f} GiB each){where}"

    @property
    def rate(self) -> float:
        """Bytes/s that a ring over all GPUs passes on.

        Between nodes all cards of a node work side by side, each for a ring of its own.
        """
        slowest = self.link
        if self.count > PER_NODE:
            slowest = min(slowest, self.network * PER_NODE)
        return slowest * LINK_SHARE

    def gather(self, nbytes: float) -> float:
        """Seconds of an all-gather, or of a reduce-scatter, of so many bytes in all."""
        if self.count == 1:
            return 0.0
        return COLLECTIVE + (self.count - 1) / self.count * nbytes / self.rate

    def all_reduce(self, nbytes: float) -> float:
        """Seconds: a reduce-scatter, then an all-gather."""
        return 2 * self.gather(nbytes)


_GIB = 2.0**30
_MACHINES = {
    "h100": (79.2, 450e9, 50e9),
    "h200": (139.0, 450e9, 50e9),
    "h20": (95.0, 450e9, 50e9),
    "a100": (79.1, 300e9, 25e9),
    "b200": (178.0, 900e9, 50e9),
    "rtx4090": (23.5, 16e9, 12.5e9),
}


def find(text: str) -> Machine:
    """The machine that is described by "8xH100", "h200" or, with other memory, "8xA100:40".

    Raises:
        ValueError: text of another form, or a GPU without figures.
    """
    form = r"(?:(\d+)x)?([a-z][a-z0-9]*)(?::(\d+(?:\.\d+)?)(?:gib)?)?"
    found = re.fullmatch(form, text.lower())
    count = int(found[1] or 1) if found else 0
    if found is None or count < 1 or (found[3] is not None and float(found[3]) == 0):
        raise ValueError(
            "--gpus takes a number and a name, such as 8xH100, or with the GiB of one GPU "
            f"8xA100:40, got {text!r}; names are {', '.join(_MACHINES)}"
        )
    gpu = gpus.find(found[2])
    gib, link, network = _MACHINES[gpu.name]
    machine = Machine(gpu, count, gib * _GIB, link, network)
    return machine if found[3] is None else replace(machine, memory=float(found[3]) * _GIB)
