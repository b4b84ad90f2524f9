"""What a good engineer gets of FAR without writing a kernel: 16-bit weights and torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastfar.levels import unpatchify
from fastfar.model import FAR
from fastfar.noise import NoiseSource
from fastfar.ops import filter_mask_patchify
from fastfar.plan import SamplingPlan
from fastfar.profiling import annotate
from fastfar.solver import PUBLISHED, schedule


class Compiled:
    """Latents of labels, noise and a plan without masks, by torch.compile.

    The transformer, and a whole diffusion step (the published head, guidance, update), are
    compiled with static shapes; on CUDA as CUDA graphs ("reduce-overhead").

    Args:
        model: FAR with its weights in `dtype`.
        dtype: of the networks; the state of the diffusion stays float32.
    """

    def __init__(self, model: FAR, dtype: torch.dtype) -> None:
        self.model, self.dtype, self.device = model, dtype, model.fake_latent.device
        options: dict[str, Any] = {"dynamic": False, "fullgraph": True}
        if self.device.type == "cuda":
            options["mode"] = "reduce-overhead"
        self.transformer = torch.compile(self.model, **options)
        self.step = torch.compile(self._step, **options)

    def _step(
        self,
        x_NP: Tensor,
        condition_MD: Tensor,
        level_M: Tensor,
        timestep_M: Tensor,
        table_11: Tensor,
        noise_NP: Tensor,
        scale: Tensor,
        x0_range_2: Tensor,
    ) -> Tensor:
        """One diffusion step of the published head; scale is the guidance's."""
        rows = len(x_NP)
        both_MP = x_NP.repeat(2, 1).to(self.dtype)
        out_M2P = self.model.head(both_MP, timestep_M, condition_MD, level_M).float()
        eps_MP, v_MP = out_M2P.chunk(2, dim=-1)
        eps_NP = eps_MP[rows:] + scale * (eps_MP[:rows] - eps_MP[rows:])
        x0_NP = (table_11[0] * x_NP - table_11[1] * eps_NP).clamp(x0_range_2[0], x0_range_2[1])
        fraction = (v_MP[:rows] + 1.0) / 2.0
        log_variance = fraction * table_11[6] + (1.0 - fraction) * table_11[5]
        noise_NP = table_11[7] * torch.exp(0.5 * log_variance) * noise_NP
        next_NP: Tensor = table_11[2] * x_NP + table_11[3] * x0_NP + noise_NP
        return next_NP

    @torch.inference_mode()
    def __call__(self, labels_B: Tensor, noise: NoiseSource, plan: SamplingPlan) -> Tensor:
        """Latents of the labels."""
        config, device = self.model.config, self.device
        batch = len(labels_B)
        class_MD = torch.cat(
            [
                self.model.class_embedding(labels_B.to(device)),
                self.model.unconditional_embedding(batch),
            ]
        )
        tokens_BLP = torch.zeros(batch, config.num_tokens, config.token_dim, device=device)
        latent_BCHH = unpatchify(tokens_BLP, config.patch_size)
        x0_range_2 = torch.tensor(plan.x0_range or (-torch.inf, torch.inf), device=device)
        for k, level in enumerate(plan.levels):
            if k > 0:
                given = plan.input_levels[k]
                levels_B = torch.full((batch,), -1 if given is None else given, device=device)
                tokens_BLP = filter_mask_patchify(
                    latent_BCHH,
                    levels_B,
                    None,
                    patch_size=config.patch_size,
                    num_levels=config.num_levels,
                    kind=config.filter,
                )
            both = tokens_BLP.repeat(2, 1, 1).to(self.dtype)
            with annotate("transformer"):
                z_MD = self.transformer(both, class_MD).flatten(0, 1).clone()
            x_NP, count = noise.initial(k), plan.diffusion_steps[k]
            noise_TNP = noise.steps(k, count)
            steps = schedule(PUBLISHED, count, config.num_timesteps, plan.temperatures[k])
            timesteps = torch.tensor(steps.timesteps, device=device)
            table_T11 = steps.table.to(device, torch.float32)
            level_M = torch.full((len(z_MD),), float(level), device=device)
            scale = torch.tensor(plan.guidance_scales[k], device=device)
            with annotate("head"):
                for t in range(count):
                    timestep_M = timesteps[t].expand(len(z_MD)).contiguous()
                    # A copy, as a CUDA graph writes over its result when it is replayed.
                    x_NP = self.step(
                        x_NP, z_MD, level_M, timestep_M, table_T11[t], noise_TNP[t], scale,
                        x0_range_2,
                    ).clone()  # fmt: skip
            x_BLP = x_NP.view(batch, config.num_tokens, -1)
            latent_BCHH = unpatchify(x_BLP, config.patch_size)
        return latent_BCHH
