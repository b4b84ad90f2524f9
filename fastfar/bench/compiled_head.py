"""What a good engineer gets of the denoising loop without writing a kernel: torch.compile.

As `fastfar.ops.denoise_loop` on PyTorch, everything that depends on the condition or on t alone is
computed once; a whole diffusion step, guidance and update included, is compiled with static shapes
and frozen 16-bit weights. The bar that a kernel has to clear.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfar.diffusion import timestep_embedding
from fastfar.solver import PUBLISHED, schedule


class Step(nn.Module):
    """One diffusion step with nothing left to decide.

    forward(x_NP, time_1W, base_MW, table_11, noise_NP) -> x_NP: base_MW and time_1W are the hoisted
    embeddings, table_11 the step's row of `schedule`.
    """

    final_layer_linear_weight: Tensor
    final_layer_linear_bias: Tensor

    def __init__(
        self, head: Mapping[str, Tensor], tokens: int, scale: float, bounds: tuple[float, float]
    ) -> None:
        super().__init__()
        self.tokens, self.scale, self.bounds = tokens, scale, bounds
        self.depth = sum(name.endswith(".in_ln.weight") for name in head)
        layers = [*(f"res_blocks.{i}." for i in range(self.depth)), "final_layer."]
        for part in ("weight", "bias"):
            each = [head[f"{name}adaLN_modulation.1.{part}"] for name in layers]
            self.register_buffer(f"modulation_{part}", torch.cat(each))
        for name, value in head.items():
            if "adaLN" not in name and "embed" not in name:
                self.register_buffer(name.replace(".", "_"), value)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, getattr(self, name + "_weight"), getattr(self, name + "_bias"))

    def forward(
        self, x_NP: Tensor, time_1W: Tensor, base_MW: Tensor, table_11: Tensor, noise_NP: Tensor
    ) -> Tensor:
        modulation = self._linear("modulation", F.silu(base_MW + time_1W))
        parts = iter(modulation.chunk(3 * self.depth + 2, dim=-1))
        h_NW = self._linear("input_proj", x_NP.to(base_MW.dtype))
        h_MW = torch.cat([h_NW, h_NW])  # both halves of guidance see the same tokens
        width = h_MW.shape[-1:]
        for i in range(self.depth):
            name = f"res_blocks_{i}_"
            shift, scale, gate = next(parts), next(parts), next(parts)
            affine = getattr(self, name + "in_ln_weight"), getattr(self, name + "in_ln_bias")
            y_MW = F.layer_norm(h_MW, width, *affine, 1e-6) * (1.0 + scale) + shift
            y_MW = self._linear(name + "mlp_2", F.silu(self._linear(name + "mlp_0", y_MW)))
            h_MW = h_MW + gate * y_MW
        shift, scale = next(parts), next(parts)
        y_MW = F.layer_norm(h_MW, width, eps=1e-6) * (1.0 + scale) + shift
        eps_NP, v_NP = self._linear("final_layer_linear", y_MW[: self.tokens]).float().chunk(2, -1)
        numbers = x_NP.shape[-1]
        weight, bias = self.final_layer_linear_weight, self.final_layer_linear_bias
        free_NP = F.linear(y_MW[self.tokens :], weight[:numbers], bias[:numbers]).float()
        eps_NP = free_NP + self.scale * (eps_NP - free_NP)
        x0_NP = (table_11[0] * x_NP - table_11[1] * eps_NP).clamp(*self.bounds)
        fraction = (v_NP + 1.0) / 2.0
        log_variance = fraction * table_11[6] + (1.0 - fraction) * table_11[5]
        noise_NP = table_11[7] * torch.exp(0.5 * log_variance) * noise_NP
        next_NP: Tensor = table_11[2] * x_NP + table_11[3] * x0_NP + noise_NP
        return next_NP


def compiled_denoise_loop(
    head: Mapping[str, Tensor],
    condition_MD: Tensor,
    level: float,
    initial_NP: Tensor,
    noise_TNP: Tensor,
    *,
    guidance_scale: float,
    temperature: float,
    x0_range: tuple[float, float],
    num_timesteps: int = 1000,
) -> Callable[[], Tensor]:
    """A function that runs `fastfar.ops.denoise_loop` of these guided, bounded arguments.

    Embeddings are hoisted, and part of each run; compilation happens in the first one.
    """
    dtype, device = head["input_proj.weight"].dtype, initial_NP.device
    step: Any = torch.compile(
        Step(head, len(initial_NP), guidance_scale, x0_range).eval(),
        dynamic=False,
        fullgraph=True,
        options={"freezing": True},
    )
    steps = schedule(PUBLISHED, len(noise_TNP), num_timesteps, temperature)
    table_T11 = steps.table.to(device, torch.float32)
    timesteps = torch.tensor(steps.timesteps, device=device)

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, head[name + ".weight"], head[name + ".bias"])

    @torch.no_grad()  # weights are frozen only where no gradient is wanted
    def run() -> Tensor:
        features = timestep_embedding(timesteps).to(dtype)
        time_TW = linear("time_embed.mlp.2", F.silu(linear("time_embed.mlp.0", features)))
        level_11 = torch.full((1, 1), float(level), dtype=dtype, device=device)
        base_MW = linear("cond_embed", condition_MD.to(dtype))
        base_MW = base_MW + linear("index_cond_embed", level_11)
        x_NP = initial_NP.float()
        for t, noise_NP in enumerate(noise_TNP.float()):
            x_NP = step(x_NP, time_TW[t : t + 1], base_MW, table_T11[t], noise_NP)
        return x_NP

    return run
