"""Expected time of one kernel, and what bounds it.

A kernel is so many programs (thread blocks), each of which multiplies tiles and moves bytes. With
R = ceil(programs / SMs) programs on the busiest SM, the kernel takes the longest of

    tensor   R * FLOPs of a program / (share * peak / SMs)      tile padding and partly filled
                                                                last waves count
    SM       R * bytes of a program / rate of one SM            64 bytes a clock, or what is under
                                                                way / latency (Little) if less
    L2       bytes of all programs / bandwidth of L2      less what clusters of programs share
    memory   bytes that miss L2 / bandwidth of memory           see `Cache`

plus a latency for every load that waits for another one (two in most kernels: the first load, the
last store) and the gap to the next kernel. Where those are longer than the rest the bound is
"launch".

Left out: instructions other than products (exponentials, address arithmetic), how long a product of
few rows takes from its operands to its sums, bank conflicts, register pressure, uneven clocks, the
two halves of an L2, the longer latency of memory, and that a kernel's bounds overlap imperfectly.
So a prediction is a lower bound of sorts. On an H100 it is a third too low for kernels that only
move rows, by half for `step_kernel`, a chain of small products, and a fifth for FAR-H's denoising
loop; products are 5 to 20 % faster than predicted (tests/test_costs_measured.py).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastfar.costs.gpus import GPU

BOUNDS = ("tensor", "SM", "L2", "memory", "launch")

# Tiles among which cuBLAS and cuDNN are assumed to take the fastest for a shape; from Hopper on
# there are more, of which a profile of FAR-H shows these.
LIBRARY_TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64))
HOPPER_TILES = (*LIBRARY_TILES, (192, 192), (128, 160), (160, 128), (112, 64), (64, 112))
ATTENTION_TILE = 128  # queries of a program of flash attention [assumed]
STREAM_NUMBERS = 2048  # numbers of the result per program of an elementwise kernel [assumed]


@dataclass(frozen=True)
class Touch:
    """A tensor that a kernel reads or writes: which storage, its size, the bytes, the direction."""

    storage: int
    storage_bytes: int
    nbytes: int
    writes: bool = False


@dataclass(frozen=True)
class Work:
    """What one kernel does.

    Attributes:
        name: of the kernel or library call.
        programs: thread blocks.
        flops: of products, all programs together, padding included.
        moved: bytes that all programs load and store.
        touches: distinct tensors behind them.
        dtype: of the operands.
        kind: "triton", "library" or "attention": which share of the peak its products reach.
        in_flight: bytes of loads that a program keeps under way; 0: as many as it takes.
        multicast: bytes of those loads that come with those of another program in its cluster.
        trips: loads and stores of a program that wait for each other.
    """

    name: str
    programs: int
    flops: float = 0.0
    moved: float = 0.0
    touches: tuple[Touch, ...] = ()
    dtype: torch.dtype = torch.bfloat16
    kind: str = "library"
    in_flight: float = 0.0
    multicast: float = 0.0
    trips: int = 2


@dataclass(frozen=True)
class Cost:
    """Time of one kernel.

    Attributes:
        work: the kernel.
        parts: seconds by each bound but "launch".
        memory_bytes: that missed L2.
        fixed: seconds of latency and launch gap.
    """

    work: Work
    parts: dict[str, float] = field(repr=False)
    memory_bytes: float
    fixed: float

    @property
    def busy(self) -> float:
        """Seconds without latency and gap."""
        return max(self.parts.values())

    @property
    def seconds(self) -> float:
        """From the start of this kernel to that of the next one."""
        return self.busy + self.fixed

    @property
    def bound(self) -> str:
        """The longest part."""
        name = max(self.parts, key=lambda part: self.parts[part])
        return "launch" if self.fixed > self.parts[name] else name


def share(kind: str, gpu: GPU) -> float:
    """Of the peak that products of this kind reach where nothing else bounds them."""
    shares = {
        "triton": gpu.triton_share,
        "library": gpu.library_share,
        "attention": gpu.attention_share,
    }
    return shares[kind]


def price(work: Work, gpu: GPU, memory_bytes: float = 0.0) -> Cost:
    """The model of this module.

    memory_bytes: of its traffic that does not hit L2.
    """
    programs = max(work.programs, 1)
    rounds = math.ceil(programs / gpu.sms)
    sm_flops = gpu.peak(work.dtype) * share(work.kind, gpu) / gpu.sms
    sm_rate = gpu.sm_bytes * gpu.clock
    if work.in_flight:
        sm_rate = min(sm_rate, work.in_flight / gpu.latency)
    multiplies = work.flops / programs / sm_flops  # of one program
    loads = work.moved / programs / sm_rate
    parts = {
        "tensor": rounds * multiplies,
        "SM": rounds * loads,
        "L2": (work.moved - work.multicast) / gpu.l2,
        "memory": memory_bytes / (gpu.memory * gpu.memory_share),
    }
    return Cost(work, parts, memory_bytes, work.trips * gpu.latency + gpu.launch_gap)


class Cache:
    """An L2 cache as a list of storages, the one that was used least recently at its end.

    It holds whole storages: one that is larger than the cache is never found in it, and displaces
    as much as is touched of it. A read that is not found comes from memory; what was written goes
    there when it is displaced.
    """

    def __init__(self, size: float) -> None:
        self.size = size
        self._held: OrderedDict[int, tuple[int, int]] = OrderedDict()  # storage -> bytes, dirty

    def touch(self, touches: Iterable[Touch]) -> float:
        """Bytes that a kernel with these touches moves between cache and memory."""
        moved = passing = 0.0
        for each in touches:
            if each.storage_bytes > self.size:
                moved += each.nbytes
                passing += each.nbytes
                continue
            found = self._held.pop(each.storage, None)
            dirty = 0 if found is None else found[1]
            if found is None and not each.writes:
                moved += each.nbytes
            if each.writes:
                dirty = min(dirty + each.nbytes, each.storage_bytes)
            self._held[each.storage] = (each.storage_bytes, dirty)
        while self._held and passing + sum(size for size, _ in self._held.values()) > self.size:
            _, (_, dirty) = self._held.popitem(last=False)
            moved += dirty
        return moved


def price_all(works: Sequence[Work], gpu: GPU, warm: bool = False) -> list[Cost]:
    """Costs of kernels that run one after the other, from a cold L2 or from their own second run.

    warm: they run again and again, and the L2 holds what a run leaves in it.
    """
    cache = Cache(gpu.l2_size)
    if warm:
        for work in works:
            cache.touch(work.touches)
    return [price(work, gpu, cache.touch(work.touches)) for work in works]


# --- what a kernel does, from its shape ------------------------------------------------------


def touch(x: Tensor, writes: bool = False) -> Touch:
    """Of a tensor, fake ones included."""
    storage = x.untyped_storage()
    nbytes = min(x.numel() * x.element_size(), storage.nbytes())
    return Touch(storage._cdata, storage.nbytes(), nbytes, writes)


def product(
    name: str,
    m: int,
    n: int,
    k: int,
    *,
    tile: tuple[int, int],
    k_tile: int = 1,
    batch: int = 1,
    operand_bytes: tuple[int, int] = (2, 2),
    tile_bytes: int = 0,
    kind: str = "library",
    dtype: torch.dtype = torch.bfloat16,
    touches: tuple[Touch, ...] = (),
) -> Work:
    """(m, k) times (k, n) in tiles: each program loads its panels of A and W over all of k.

    Args:
        tile: rows and columns of a program's result.
        k_tile: k is padded to a multiple of it.
        operand_bytes: of one number of A and of W.
        tile_bytes: per number of the result that is stored.
    """
    rows, columns = tile
    depth = -(-k // k_tile) * k_tile
    programs = batch * -(-m // rows) * -(-n // columns)
    panels = rows * operand_bytes[0] + columns * operand_bytes[1]
    return Work(
        name,
        programs,
        flops=2.0 * programs * rows * columns * depth,
        moved=float(programs * (panels * depth + rows * columns * tile_bytes)),
        touches=touches,
        dtype=dtype,
        kind=kind,
    )


def library_product(
    gpu: GPU, name: str, m: int, n: int, k: int, size: int, **options: Any
) -> Work:
    """A product by cuBLAS or cuDNN: with the fastest of its tiles.

    From Hopper on two programs of a cluster share the larger of their panels (TMA multicast).
    """
    candidates = []
    hopper = 90 <= gpu.arch < 120
    for tile in HOPPER_TILES if hopper else LIBRARY_TILES:
        work = product(name, m, n, k, tile=tile, k_tile=32, operand_bytes=(size, size),
                       tile_bytes=size, **options)  # fmt: skip
        if hopper:
            panel = max(tile) * size * -(-k // 32) * 32
            work = replace(work, multicast=work.programs * panel / 2)
        candidates.append(work)
    return min(candidates, key=lambda work: price(work, gpu).seconds)


def attention(
    name: str, batch_heads: int, queries: int, keys: int, width: int, size: int, **options: Any
) -> Work:
    """Flash attention: a program holds a tile of queries and streams all keys and values."""
    tiles = -(-queries // ATTENTION_TILE)
    programs = batch_heads * tiles
    padded = tiles * ATTENTION_TILE
    return Work(
        name,
        programs,
        flops=4.0 * batch_heads * padded * keys * width,
        moved=float(programs * size * width * 2 * (keys + ATTENTION_TILE)),
        kind="attention",
        **options,
    )


def stream(name: str, numbers: int, touches: tuple[Touch, ...], **options: Any) -> Work:
    """A kernel that reads and writes its tensors once."""
    moved = float(sum(each.nbytes for each in touches))
    programs = max(1, -(-numbers // STREAM_NUMBERS))
    return Work(name, programs, moved=moved, touches=touches, **options)


# --- recorded launches of Triton kernels -----------------------------------------------------


def _rows(launch: Any, touches: tuple[Touch, ...]) -> Work:
    """A kernel without products: its grid, and every tensor once."""
    work = stream(launch_name(launch), 1, touches, kind="triton")
    return replace(work, programs=math.prod(launch.grid))


def _activate(launch: Any, touches: tuple[Touch, ...]) -> Work:
    """activate_kernel: the rows of the conditions are read for each of its diffusion steps."""
    work, base, (_, steps) = _rows(launch, touches), launch.argument("base_ptr"), launch.grid
    return replace(work, moved=work.moved + (steps - 1) * base.numel() * base.element_size())


def _in_place(launch: Any, touches: tuple[Touch, ...]) -> Work:
    """convolution_residual_kernel: its first tensor is read and written."""
    written = replace(touches[0], writes=True)
    return _rows(launch, (*touches, written))


def _step(launch: Any, touches: tuple[Touch, ...]) -> Work:
    """step_kernel: BM tokens of all halves and TILES tiles of the next stream, or one of the two.

    The end reads the rows of the final layer's operand and its weight, whatever columns a program
    has; the beginning waits for the new x, then for its moments, then for the input projection.
    """
    given, options = launch.argument, launch.options
    width, channels, padded = int(given("width")), int(given("channels")), options["CHANNELS"]
    tile, halves, programs = options["BM"], options["HALVES"], math.prod(launch.grid)
    operand = given("final_ptr").element_size()
    loads = flops = in_flight = 0.0
    if given("h_ptr") is not None:
        a_turn = options["BK"] * operand * (halves * tile + 2 * channels)
        loads += a_turn * width / options["BK"]
        flops += 2 * tile * padded * width * (halves + 1)  # eps of each half, one variance
        in_flight = float(max(options["num_stages"] - 1, 1) * a_turn)
    begins = given("out_ptr") is not None
    if begins:
        columns = min(width, options["TILES"] * options["BN"])
        loads += columns * (channels * operand + tile * (4 + 2 * halves * operand))
        flops += 2 * tile * padded * (columns + padded)
    return Work(
        launch_name(launch),
        programs,
        flops=programs * flops,
        moved=programs * loads,
        touches=touches,
        dtype=given("final_ptr").dtype,
        kind="triton",
        in_flight=in_flight,
        trips=4 if begins else 2,
    )


KERNELS: dict[str, Callable[[Any, tuple[Touch, ...]], Work]] = {
    "activate_kernel": _activate,
    "convolution_residual_kernel": _in_place,
    "step_kernel": _step,
}


# Arguments that a kernel of the head writes whole, in buffers that are used again and again.
RESULTS = ("out_ptr", "out_MW", "stream_ptr", "stream_MW", "new_x_ptr", "new_x0_ptr")


def launch_name(launch: Any) -> str:
    """Name of the kernel."""
    return str(launch.name).removesuffix("_kernel")


def launched(launch: Any, known: Callable[[Tensor], bool]) -> Work:
    """What a recorded launch does.

    known: whether a tensor was there before, and so is read; else, and in `RESULTS`, it is written.
        Kernels without an entry in `KERNELS` are taken to read or write each tensor once.
    """
    named = zip(launch.kernel.arg_names, launch.args, strict=False)
    touches = tuple(
        touch(x, writes=name in RESULTS or not known(x))
        for name, x in named
        if isinstance(x, Tensor)
    )
    return KERNELS.get(str(launch.name), _rows)(launch, touches)
