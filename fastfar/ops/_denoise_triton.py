"""`denoise_loop` by Triton's kernels (kernels/gpu/denoise_loop.py) around cuBLAS's products."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfar.ops._folded_head import FoldedHead, fold_head
from fastfar.ops._triton import architecture, kernel_op, kernels
from fastfar.solver import PUBLISHED, Moments, Segment, Solver, schedule, shaped

EPS = 1e-6
MODULATED_ROWS = 4096  # rows that make a product large: 90 % of the peak of an H100


@kernel_op("denoise_activate", mutates=("out_XW",))
def _activate(base_MW: Tensor, time_CW: Tensor, out_XW: Tensor) -> None:
    kernels("denoise_loop").activate(base_MW, time_CW, out_XW, arch=architecture(out_XW))


@kernel_op("denoise_add_silu", mutates=("out_MW",))
def _add_silu(y_MW: Tensor, addend_MW: Tensor, out_MW: Tensor) -> None:
    kernels("denoise_loop").add_silu(y_MW, addend_MW, out_MW, arch=architecture(out_MW))


@kernel_op("denoise_gate_layernorm", mutates=("stream_MW", "out_MW"))
def _gate_layernorm(
    y_MW: Tensor,
    gate_MW: Tensor,
    residual_RW: Tensor,
    scale_MW: Tensor,
    stream_MW: Tensor | None,
    out_MW: Tensor,
    eps: float,
) -> None:
    kernels("denoise_loop").gate_layernorm(
        y_MW, gate_MW, residual_RW, scale_MW, stream_MW, out_MW, eps=eps, arch=architecture(out_MW)
    )


@kernel_op("denoise_step", mutates=("new_x_NP", "new_x0_NP", "stream_NW", "out_MW"))
def _step(
    h_MW: Tensor | None,
    addend_M2P: Tensor | None,
    final_2PW: Tensor,
    x_NP: Tensor,
    new_x_NP: Tensor | None,
    x0_NP: Tensor | None,
    new_x0_NP: Tensor | None,
    noise_NP: Tensor | None,
    table_11: Tensor | None,
    w_WP: Tensor,
    bias_W: Tensor,
    moments: Tensor,
    scale_MW: Tensor | None,
    stream_NW: Tensor | None,
    out_MW: Tensor | None,
    *,
    halves: int,
    guidance: float,
    low: float,
    high: float,
    eps: float,
) -> None:
    kernels("denoise_loop").step(
        h_MW, addend_M2P, final_2PW, x_NP, new_x_NP, x0_NP, new_x0_NP, noise_NP, table_11, w_WP,
        bias_W, moments, scale_MW, stream_NW, out_MW, halves=halves, guidance=guidance, low=low,
        high=high, eps=eps, arch=architecture(x_NP),
    )  # fmt: skip


_ALIGNED = 4  # numbers in 16 bytes


@cache
def _device_update_table(
    solver: Solver, steps: int, num_timesteps: int, temperature: float, device: torch.device
) -> Tensor:
    """(T, 12) float32: the table of `schedule` and zeros, so that all rows are equally aligned.

    Shared: do not write to it. Never dropped: graphs point to it.
    """
    with torch.inference_mode(False):
        table = schedule(solver, steps, num_timesteps, temperature).table
        return F.pad(table, (0, -table.shape[1] % _ALIGNED)).to(device, torch.float32)


def steps_ahead(rows: int, steps: int) -> int:
    """Diffusion steps whose modulations are one product: as many as have MODULATED_ROWS rows."""
    return min(steps, max(1, MODULATED_ROWS // rows))


class _Loop:
    """Buffers of steps that are all guided or none, and what a step launches.

    base_MW: M = 2 N rows where guided, else N. chunk: steps whose modulations are one product.

    Parts of tensors are taken by narrow and select: fake CUDA tensors refuse indexing.
    """

    modulations_XC: Tensor  # of the chunk at hand, step by step

    def __init__(
        self,
        head: FoldedHead,
        base_MW: Tensor,
        initial_NP: Tensor,
        chunk: int,
        **options: float,
    ) -> None:
        rows, width = base_MW.shape
        tokens = len(initial_NP)
        dtype, device = head.compute_dtype, initial_NP.device
        self.head, self.base_MW, self.options = head, base_MW, options
        self.halves, self.chunk = rows // tokens, chunk

        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.activated_XW = empty(chunk * rows, width)
        # The residual stream behind the input projection, which both halves share, and that of the
        # blocks.
        self.first_NW = empty(tokens, width, dtype=torch.float32)
        self.stream_MW = empty(rows, width, dtype=torch.float32)
        self.hidden_MW = empty(rows, width)
        # Two each, before and after the end of a step: its programs read what others would write.
        self.operand = [empty(rows, width) for _ in range(2)]
        x_NP = initial_NP.to(torch.float32, copy=True)
        self.x = [x_NP, torch.empty_like(x_NP)]
        self.x0 = [torch.zeros_like(x_NP), torch.empty_like(x_NP)]

    def run(self, time_TW: Tensor, table_T12: Tensor, noise_TNP: Tensor) -> Tensor:
        """x_NP after these steps."""
        for first in range(0, len(time_TW), self.chunk):
            count = min(self.chunk, len(time_TW) - first)
            self.modulate(time_TW.narrow(0, first, count))
            self.begin()
            for place in range(count):
                noise_NP, table_12 = (x.select(0, first + place) for x in (noise_TNP, table_T12))
                self.step(place, noise_NP, table_12, last=place == count - 1)
        return self.x[0]

    def modulate(self, time_CW: Tensor) -> None:
        """Modulations of all rows at the steps of a chunk."""
        count = len(time_CW) * len(self.base_MW)
        activated = self.activated_XW.narrow(0, 0, count)
        _activate(self.base_MW, time_CW, activated)
        weight, bias = self.head["modulations.weight"], self.head["modulations.bias"]
        self.modulations_XC = F.linear(activated, weight, bias)

    def _modulations(self, place: int) -> Tensor:
        """Those of the step at this place of its chunk."""
        rows = len(self.base_MW)
        return self.modulations_XC.narrow(0, place * rows, rows)

    def begin(self) -> None:
        """Opens the first step of a chunk."""
        self._step(self._modulations(0).narrow(1, 0, self.head.width))

    def step(
        self, place: int, noise_NP: Tensor, table_12: Tensor, *, last: bool
    ) -> None:
        """The blocks of a diffusion step and its end; last: no next one is opened."""
        head, width, modulations_MC = self.head, self.head.width, self._modulations(place)
        residual, operand_MW = self.first_NW, self.operand[0]
        for i in range(head.depth):
            start = (3 * i + 1) * width
            addend, gate, scale = (
                modulations_MC.narrow(1, start + part * width, width) for part in range(3)
            )
            y_MW = F.linear(operand_MW, head[f"{i}.fc1.weight"])
            _add_silu(y_MW, addend, self.hidden_MW)
            y_MW = F.linear(self.hidden_MW, head[f"{i}.fc2.weight"], head[f"{i}.fc2.bias"])
            stream = self.stream_MW if i < head.depth - 1 else None  # the last one is not read
            _gate_layernorm(y_MW, gate, residual, scale, stream, operand_MW, EPS)
            residual = self.stream_MW
        start = (3 * head.depth + 1) * width
        addend_M2P = modulations_MC.narrow(1, start, 2 * head.channels)
        scale_MW = None if last else self._modulations(place + 1).narrow(1, 0, width)
        self._step(scale_MW, addend_M2P, noise_NP, table_12)
        for pair in (self.operand, self.x, self.x0):
            pair.reverse()

    def _step(
        self,
        scale_MW: Tensor | None,
        addend_M2P: Tensor | None = None,
        noise_NP: Tensor | None = None,
        table_12: Tensor | None = None,
    ) -> None:
        """Ends a step if there are modulations of the final layer; begins one if there is scale."""
        ends, begins = addend_M2P is not None, scale_MW is not None
        _step(
            self.operand[0] if ends else None,
            addend_M2P,
            self.head["final.weight"],
            self.x[0],
            self.x[1] if ends else None,
            self.x0[0] if ends else None,
            self.x0[1] if ends else None,
            noise_NP,
            table_12,
            self.head["input_proj.weight"],
            self.head["input_proj.bias"],
            self.head["input_proj.moments"],
            scale_MW,
            self.first_NW if begins else None,
            self.operand[1 if ends else 0] if begins else None,
            halves=self.halves,
            eps=EPS,
            **self.options,
        )


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
    solver: Solver = PUBLISHED,
    moments: Moments | None = None,
    chunk: int | None = None,
) -> Tensor:
    """`denoise_loop` with the rows of condition that are needed; float32 state.

    head: a `FoldedHead`, or the published parameters, which are then folded in this call.
    chunk: steps whose modulations are one product; None: `steps_ahead`.
    """
    if not isinstance(head, FoldedHead):
        head = fold_head(head, head["input_proj.weight"].dtype)
    rows, count = len(initial_NP), len(noise_TNP)
    steps = schedule(solver, count, num_timesteps, temperature)
    table_T12 = _device_update_table(solver, count, num_timesteps, temperature, initial_NP.device)
    time_TW = head.time_embedding(steps.timesteps)
    x_NP, noise_TNP = shaped(solver, steps, initial_NP, noise_TNP, temperature, moments)
    x_NP, noise_TNP = x_NP.contiguous(), noise_TNP.contiguous()

    bias = torch.add(head["cond_embed.bias"], head["level.weight"], alpha=float(level))
    condition = condition_MD.to(head.compute_dtype)
    base_MW = F.linear(condition, head["cond_embed.weight"]).to(torch.float32) + bias
    low, high = x0_range if x0_range is not None else (-math.inf, math.inf)
    options = {"guidance": guidance_scale, "low": low, "high": high}
    guided = len(condition_MD) == 2 * rows
    for first, last, in_range in steps.segments if guided else (Segment(0, count, False),):
        segment_MW = base_MW if in_range else base_MW.narrow(0, 0, rows)
        length = last - first
        ahead = steps_ahead(len(segment_MW), length) if chunk is None else min(chunk, length)
        loop = _Loop(head, segment_MW, x_NP, ahead, **options)
        x_NP = loop.run(*(x.narrow(0, first, length) for x in (time_TW, table_T12, noise_TNP)))
    return x_NP
