"""`denoise_loop` by Triton's kernels: kernels/gpu/denoise_loop.py and _gemm.py."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from fastfar import backend
from fastfar.diffusion import update_table
from fastfar.ops import _schedule
from fastfar.ops._folded_head import FoldedHead, fold_head
from fastfar.ops._gemm import gemm
from fastfar.ops._triton import architecture, kernel_op, kernels, traced

EPS = 1e-6
MOST_STEPS_AHEAD = 8
# Rows from which the modulations of one step alone are a product large enough.
MANY_ROWS = 8192


@kernel_op("denoise_activate", mutates=("out_XW",))
def _activate(base_MW: Tensor, time_CW: Tensor, out_XW: Tensor) -> None:
    kernels("denoise_loop").activate(base_MW, time_CW, out_XW, arch=architecture(out_XW))


@kernel_op("denoise_project", mutates=("out_NW", "copy_NW", "statistics"))
def _project(
    x_NP: Tensor,
    w_WP: Tensor,
    bias_W: Tensor,
    out_NW: Tensor,
    copy_NW: Tensor | None,
    statistics: Tensor,
) -> None:
    kernels("denoise_loop").first_projection(
        x_NP, w_WP, bias_W, out_NW, copy_NW, statistics, arch=architecture(out_NW)
    )


@kernel_op("denoise_step", mutates=("x_NP", "x0_NP", "out_NW", "copy_NW", "out_statistics"))
def _step(
    h_MW: Tensor,
    statistics: Tensor,
    statistics_tile: int,
    scale_MW: Tensor,
    addend_M2P: Tensor,
    final_2PW: Tensor,
    x_NP: Tensor,
    x0_NP: Tensor,
    noise_NP: Tensor,
    table_8: Tensor,
    w_WP: Tensor,
    bias_W: Tensor,
    out_NW: Tensor | None,
    copy_NW: Tensor | None,
    out_statistics: Tensor | None,
    *,
    halves: int,
    guidance: float,
    low: float,
    high: float,
    eps: float,
) -> None:
    kernels("denoise_loop").step(
        h_MW, statistics, statistics_tile, scale_MW, addend_M2P, final_2PW, x_NP, x0_NP, noise_NP,
        table_8, w_WP, bias_W, out_NW, copy_NW, out_statistics, halves=halves, guidance=guidance,
        low=low, high=high, eps=eps, arch=architecture(x_NP),
    )  # fmt: skip


@cache
def _device_update_table(
    steps: int, num_timesteps: int, temperature: float, device: torch.device
) -> Tensor:
    """`update_table` on a device. Shared: do not write to it. Never dropped: graphs point to it."""
    with torch.inference_mode(False):
        return update_table(steps, num_timesteps, temperature).to(device)


def steps_ahead(rows: int, modulations: int, element_size: int, l2_bytes: int, steps: int) -> int:
    """Diffusion steps whose modulations are computed at once: what two buffers of them in L2 hold.

    At least 2 and at most 8, 1 from MANY_ROWS rows on, and never more than there are.
    """
    if rows >= MANY_ROWS:
        return 1
    fitting = l2_bytes // (2 * rows * modulations * element_size)
    return min(steps, MOST_STEPS_AHEAD, max(2, fitting))


class _Loop:
    """Buffers of one call, and what an entry of the schedule launches.

    Parts of tensors are taken by narrow and select: fake CUDA tensors refuse indexing.
    """

    def __init__(
        self, head: FoldedHead, base_MW: Tensor, initial_NP: Tensor, chunk: int, slots: int
    ) -> None:
        rows, width = base_MW.shape
        tokens = len(initial_NP)
        dtype, device = head.compute_dtype, initial_NP.device
        self.head, self.base_MW, self.chunk = head, base_MW, chunk
        self.halves = rows // tokens
        columns = len(head["modulations.bias"])

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.activated_XW = empty(chunk * rows, width, dtype=dtype)
        self.modulations = [empty(chunk, rows, columns, dtype=dtype) for _ in range(slots)]
        # The residual stream of the input projection, which both halves share, and of the blocks:
        # float32, and once more as the next product reads it.
        low = dtype is not torch.float32
        self.first_tile, self.tile = _tiles(device, dtype)
        self.first_NW = empty(tokens, width)
        self.first_copy_NW = empty(tokens, width, dtype=dtype) if low else None
        self.first_statistics = empty(tokens, -(-width // self.first_tile), 2)
        self.h_MW = empty(rows, width)
        self.copy_MW = empty(rows, width, dtype=dtype) if low else None
        self.statistics = empty(rows, -(-width // self.tile), 2)
        self.hidden_MW = empty(rows, width, dtype=dtype)
        self.x_NP = initial_NP.to(torch.float32, copy=True)
        self.x0_NP = torch.empty_like(self.x_NP)

    def begin(self) -> None:
        """Input projection of the first step."""
        weight, bias = self.head["input_proj.weight"], self.head["input_proj.bias"]
        _project(self.x_NP, weight, bias, self.first_NW, self.first_copy_NW, self.first_statistics)

    def modulate(self, time_CW: Tensor, slot: int) -> None:
        """Modulations of all rows at the steps of a chunk."""
        rows = len(self.base_MW)
        count = len(time_CW) * rows
        activated = self.activated_XW.narrow(0, 0, count)
        _activate(self.base_MW, time_CW, activated)
        gemm(
            activated,
            self.head["modulations.weight"],
            self.modulations[slot].flatten(0, 1).narrow(0, 0, count),
            kind="modulations" if rows < MANY_ROWS else "large",
            bias_N=self.head["modulations.bias"],
        )

    def step(
        self,
        modulations_MX: Tensor,
        noise_NP: Tensor,
        table_8: Tensor,
        *,
        last: bool,
        guidance: float,
        low: float,
        high: float,
    ) -> None:
        """One diffusion step: 2 d + 1 launches."""
        head, width = self.head, self.head.width
        residual, copy = self.first_NW, self.first_copy_NW
        statistics, tile = self.first_statistics, self.first_tile
        for i in range(head.depth):
            start = 3 * i * width
            scale, addend, gate = (
                modulations_MX.narrow(1, start + part * width, width) for part in range(3)
            )
            gemm(
                residual if copy is None else copy,
                head[f"{i}.fc1.weight"],
                self.hidden_MW,
                kind="modulated",
                statistics=statistics,
                statistics_tile=tile,
                scale_MK=scale,
                addend_MN=addend,
                activation="silu",
                eps=EPS,
            )
            gemm(
                self.hidden_MW,
                head[f"{i}.fc2.weight"],
                self.h_MW,
                kind="gated",
                bias_N=head[f"{i}.fc2.bias"],
                gate_MN=gate,
                residual_MN=residual,
                copy_MN=self.copy_MW,
                out_statistics=self.statistics,
            )
            residual, copy = self.h_MW, self.copy_MW
            statistics, tile = self.statistics, self.tile
        start = 3 * head.depth * width
        _step(
            residual if copy is None else copy,
            statistics,
            tile,
            modulations_MX.narrow(1, start, width),
            modulations_MX.narrow(1, start + width, 2 * head.channels),
            head["final.weight"],
            self.x_NP,
            self.x0_NP,
            noise_NP,
            table_8,
            head["input_proj.weight"],
            head["input_proj.bias"],
            None if last else self.first_NW,
            None if last else self.first_copy_NW,
            None if last else self.first_statistics,
            halves=self.halves,
            guidance=guidance,
            low=low,
            high=high,
            eps=EPS,
        )


def _tiles(device: torch.device, dtype: torch.dtype) -> tuple[int, int]:
    """Columns of a tile of row statistics: of the input projection, and of a block's output."""
    arch = backend.architecture(device)
    first: int = kernels("denoise_loop").statistics_tile(arch, dtype.itemsize)
    gated: int = kernels("_gemm").gemm_config("gated", arch, dtype.itemsize).tiles["BN"]
    return first, gated


def _branches(head: FoldedHead, rows: int, device: torch.device) -> int:
    """2 where the products of the serial chain leave multiprocessors idle, else 1."""
    arch, size = backend.architecture(device), head.compute_dtype.itemsize
    tiles = kernels("_gemm").gemm_config("gated", arch, size).tiles
    programs = -(-rows // tiles["BM"]) * -(-head.width // tiles["BN"])
    return 2 if programs < backend.gpu_facts(device).multiprocessors else 1


def denoise(
    head: Mapping[str, Tensor],
    condition_MD: Tensor,
    level: float,
    initial_NP: Tensor,
    noise_TNP: Tensor,
    *,
    guidance_scale: float,
    temperature: float,
    x0_range: tuple[float, float] | None,
    num_timesteps: int,
    chunk: int | None = None,
    branches: int | None = None,
) -> Tensor:
    """`denoise_loop` with the rows of condition that are needed; float32 state.

    head: a `FoldedHead`, or the published parameters, which are then folded in this call.
    chunk, branches: steps whose modulations are computed at once, and 1 or 2 streams; None leaves
    them to the size of the GPU's L2 cache and to the number of rows.
    """
    if not isinstance(head, FoldedHead):
        head = fold_head(head, head["input_proj.weight"].dtype)
    (rows, _), steps = condition_MD.shape, len(noise_TNP)
    columns, device = len(head["modulations.bias"]), initial_NP.device
    gpu = backend.gpu_facts(device)
    if chunk is None:
        chunk = steps_ahead(rows, columns, head.compute_dtype.itemsize, gpu.l2_bytes, steps)
    if branches is None:
        branches = 1 if device.type != "cuda" or traced() else _branches(head, rows, device)

    base_MW = torch.empty(rows, head.width, dtype=torch.float32, device=device)
    bias = torch.add(head["cond_embed.bias"], head["level.weight"], alpha=float(level))
    condition = condition_MD.to(head.compute_dtype).contiguous()
    gemm(condition, head["cond_embed.weight"], base_MW, kind="narrow", bias_N=bias)
    time_TW = head.time_embedding(steps, num_timesteps)
    table_T8 = _device_update_table(steps, num_timesteps, float(temperature), device)
    low, high = x0_range if x0_range is not None else (-math.inf, math.inf)

    loop = _Loop(head, base_MW, initial_NP, chunk, branches)

    def execute(item: _schedule.Item) -> None:
        if item.kind == _schedule.MODULATE:
            first = item.index * chunk
            loop.modulate(time_TW.narrow(0, first, min(chunk, steps - first)), item.slot)
            return
        loop.step(
            loop.modulations[item.slot].select(0, item.index % chunk),
            noise_TNP.select(0, item.index),
            table_T8.select(0, item.index),
            last=item.index == steps - 1,
            guidance=guidance_scale,
            low=low,
            high=high,
        )

    loop.begin()
    _schedule.run(_schedule.schedule(steps, chunk, branches), execute, device)
    return loop.x_NP
