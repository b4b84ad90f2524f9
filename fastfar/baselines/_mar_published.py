"""MAR as its published code samples: every term of the head anew at every diffusion step.

With guidance all rows are doubled, state and noise of the head too, and each coefficient of the
schedule is looked up for each row in a table that is first copied to the device.

Left as it is elsewhere: visible tokens are gathered by number, which the published code finds by
`nonzero` of the mask and thus by waiting for a GPU some ten times per outer step.

Source: LTH14/mar: models/mar.py, models/diffloss.py, diffusion/gaussian_diffusion.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfar.baselines._mar_noise import Draws
from fastfar.diffusion import diffusion_tables
from fastfar.head import EPS, ResBlock, SimpleMLPAdaLN
from fastfar.model import FAR


class Published:
    """The published form.

    Args:
        network: float32.
        autocast: enters autocast, or nothing.
        casts: whether it does.
        diffusion_steps: T.
        temperature: factor on the noise.
        x0_range: bounds of the predicted x0; None is the published rule, no bounds.
    """

    def __init__(
        self,
        network: FAR,
        autocast: Callable[[], AbstractContextManager[Any]],
        casts: bool,
        diffusion_steps: int,
        temperature: float,
        x0_range: tuple[float, float] | None,
    ) -> None:
        # As published: autocast keeps its 16-bit copies of parameters that want gradients alone.
        self.network = network.requires_grad_(True)
        self.autocast, self.casts = autocast, casts
        self.tables = diffusion_tables(diffusion_steps, network.config.num_timesteps)
        self.temperature, self.x0_range = temperature, x0_range

    def ways(self, kind: str) -> str:
        """One sentence for tables; kind: the dtype in words."""
        return (
            f"float32 weights, {f'{kind} autocast' if self.casts else 'no autocast'}, SDPA, all "
            "rows doubled for guidance, all terms of the head at every diffusion step, eager"
        )

    @contextmanager
    def context(self) -> Iterator[None]:
        """What a call runs in. In inference mode autocast would cast every weight in every call."""
        with torch.inference_mode(False), torch.no_grad(), self.autocast():
            yield

    def transformer(
        self, tokens_MLP: Tensor, class_MD: Tensor, kept_MK: Tensor, predicted_MN: Tensor
    ) -> Tensor:
        """z of the tokens `predicted` given those `kept`, (M, N, D); both are numbers of tokens."""
        mask_ML = torch.ones(tokens_MLP.shape[:2], dtype=torch.bool, device=tokens_MLP.device)
        mask_ML.scatter_(1, kept_MK, False)
        x_MSD = self.network._encode(tokens_MLP, class_MD, kept_MK)
        z_MLD = self.network._decode(x_MSD, kept_MK, mask_ML)
        return z_MLD.gather(1, predicted_MN[..., None].expand(-1, -1, z_MLD.shape[-1]))

    def head(self, condition_MD: Tensor, guidance_scale: Tensor | None, draws: Draws) -> Tensor:
        """(N, P) float32 tokens x ~ p(x | z) by T ancestral steps; guidance_scale: (1,) float32.

        M = 2 N, conditional rows first, where guided: eps = eps_u + s (eps_c - eps_u).
        """
        tables, head = self.tables, self.network.head
        rows, width = len(condition_MD), head.in_channels
        tokens = rows if guidance_scale is None else rows // 2
        x_MP = draws.next(tokens, width)
        if guidance_scale is not None:
            x_MP = torch.cat([x_MP, x_MP])
        for i in reversed(range(len(tables))):
            index_M = torch.full((rows,), i, device=x_MP.device)
            timestep_M = tables.timestep.to(x_MP.device)[index_M]
            if guidance_scale is None:
                eps_MP, v_MP = _forward(head, x_MP, timestep_M, condition_MD).chunk(2, dim=-1)
            else:
                eps_MP, v_MP = _guided(head, x_MP, timestep_M, condition_MD, guidance_scale)

            fraction_MP = (v_MP + 1) / 2
            high_M1, low_M1 = _at(tables.log_beta, index_M), _at(tables.log_posterior, index_M)
            log_variance_MP = fraction_MP * high_M1 + (1 - fraction_MP) * low_M1
            x0_MP = _at(tables.recip, index_M) * x_MP - _at(tables.recip_m1, index_M) * eps_MP
            if self.x0_range is not None:
                x0_MP = x0_MP.clamp(*self.x0_range)
            mean_MP = _at(tables.mean_x0, index_M) * x0_MP + _at(tables.mean_xt, index_M) * x_MP
            noisy_M1 = (index_M != 0).float()[:, None]  # no noise at the last step
            noise_MP = draws.next(rows, width) * self.temperature
            x_MP = mean_MP + noisy_M1 * torch.exp(0.5 * log_variance_MP) * noise_MP
        return x_MP[:tokens]


def _at(table_T: Tensor, index_M: Tensor) -> Tensor:
    """(M, 1) float32 entries of a float64 table."""
    return table_T.to(index_M.device)[index_M].float()[:, None]


def _guided(
    head: SimpleMLPAdaLN,
    x_MP: Tensor,
    timestep_M: Tensor,
    condition_MD: Tensor,
    guidance_scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """The guided eps, twice, and the variance channels; both halves see the first one's state."""
    half_NP = x_MP[: len(x_MP) // 2]
    out_M2P = _forward(head, torch.cat([half_NP, half_NP]), timestep_M, condition_MD)
    eps_MP, v_MP = out_M2P.chunk(2, dim=-1)
    with_class_NP, without_NP = eps_MP.chunk(2)
    eps_NP = without_NP + guidance_scale * (with_class_NP - without_NP)
    return torch.cat([eps_NP, eps_NP]), v_MP


def _forward(
    head: SimpleMLPAdaLN, x_MP: Tensor, timestep_M: Tensor, condition_MD: Tensor
) -> Tensor:
    """(M, 2 P): the head with nothing hoisted, shared or fused."""
    h_MW = head.input_proj(x_MP)
    y_MW = head.time_embed(timestep_M) + head.cond_embed(condition_MD)
    for block in head.res_blocks:
        assert isinstance(block, ResBlock)
        shift_MW, scale_MW, gate_MW = block.adaLN_modulation(y_MW).chunk(3, dim=-1)
        h_MW = h_MW + gate_MW * block.mlp(block.in_ln(h_MW) * (1 + scale_MW) + shift_MW)
    shift_MW, scale_MW = head.final_layer.adaLN_modulation(y_MW).chunk(2, dim=-1)
    h_MW = F.layer_norm(h_MW, h_MW.shape[-1:], eps=EPS) * (1 + scale_MW) + shift_MW
    out_M2P: Tensor = head.final_layer.linear(h_MW)
    return out_M2P
