"""The denoising MLP with its loss and its sampling, as MAR and FAR train and sample it.

Source: MAR, arXiv 2406.11838, section 3.2; FAR, arXiv 2503.05305, section 3.3; improved DDPM,
arXiv 2102.09672, for the learned variance.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastfar.head import SimpleMLPAdaLN
from fastfar.ops import add_noise, denoise_loop, hybrid_loss
from fastfar.ops._module import OpModule


class DiffLoss(OpModule):
    """Diffusion loss of tokens given their conditions, and samples of them.

    Cosine schedule, epsilon prediction, learned-range variance; the loss of a row is the mean
    squared error of eps plus the variational bound of the variance, in bits.

    Where the published code has an error, this is what was meant: `loss_weight` takes a tensor
    (FAR's raises an error for one), `mask` counts (FAR's is ignored), guidance is switched off by
    cfg = 1 as in MAR, random numbers are drawn on the device of z and by a generator if one is
    given (published: on the CPU, then copied to CUDA).

    Args:
        target_channels: P, numbers per token.
        z_channels: D, width of the condition.
        depth, width: of the MLP.
        num_sampling_steps: diffusion steps of `sample`: a whole number, or one as text.
        grad_checkpointing: see `SimpleMLPAdaLN`.
        level_input: FAR's head, which is told the frequency level; False is MAR's, without it.
        num_timesteps: diffusion steps of training.
        backend: see `fastfar.nn`.

    Raises:
        ValueError: num_sampling_steps is not a whole number in 1..num_timesteps.
    """

    def __init__(
        self,
        target_channels: int,
        z_channels: int,
        depth: int,
        width: int,
        num_sampling_steps: int | str = 100,
        grad_checkpointing: bool = False,
        *,
        level_input: bool = True,
        num_timesteps: int = 1000,
        backend: str | None = "auto",
    ) -> None:
        super().__init__(backend)
        self.in_channels = target_channels
        self.num_timesteps = num_timesteps
        self.num_sampling_steps = _steps(num_sampling_steps, num_timesteps)
        self.net = SimpleMLPAdaLN(
            in_channels=target_channels,
            model_channels=width,
            out_channels=2 * target_channels,
            z_channels=z_channels,
            num_res_blocks=depth,
            grad_checkpointing=grad_checkpointing,
            level_input=level_input,
            backend=backend,
        )

    def forward(
        self,
        target: Tensor,
        z: Tensor,
        index: Tensor | None = None,
        mask: Tensor | None = None,
        loss_weight: Tensor | bool | None = None,
        *,
        timestep: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Mean loss of the rows: sum(mask * loss_weight * loss) / sum(mask).

        Args:
            target: (N, P) clean tokens.
            z: (N, D) their conditions.
            index: (N,) or (N, 1) frequency levels; None tells the head none.
            mask: (N,), 1 or True where a row counts; None is everywhere.
            loss_weight: (N,) factors; None or False is 1.
            timestep, noise: (N,) int64 and (N, P) draws; None draws them, in this order, from
                PyTorch's generator of the device, as the published code does.

        Returns:
            scalar, float32 (float64 for float64 targets).

        Raises:
            ValueError: an index for a head without level input; TypeError: loss_weight is neither
                a tensor nor nothing.
        """
        if timestep is None:
            timestep = torch.randint(0, self.num_timesteps, target.shape[:1], device=target.device)
        if noise is None:
            noise = torch.randn_like(target)
        mask_N = None if mask is None else mask.to(torch.promote_types(target.dtype, torch.float32))
        weight_N = mask_N
        if loss_weight is not None and loss_weight is not False:
            if not isinstance(loss_weight, Tensor):
                raise TypeError(f"loss_weight must be a tensor or None, got {loss_weight!r}")
            weight_N = loss_weight if mask_N is None else loss_weight * mask_N
        with self.on_backend(target):
            noised_NP = add_noise(target, noise, timestep, num_timesteps=self.num_timesteps)
            loss_N = hybrid_loss(
                self.net(noised_NP, timestep, z, index),
                target,
                noise,
                noised_NP,
                timestep,
                weight_N=weight_N,
                num_timesteps=self.num_timesteps,
            )
        return loss_N.mean() if mask_N is None else loss_N.sum() / mask_N.sum()

    @torch.no_grad()
    def sample(
        self,
        z: Tensor,
        temperature: float = 1.0,
        cfg: float = 1.0,
        index: Tensor | float | None = None,
        *,
        generator: torch.Generator | None = None,
        initial: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Tokens for the conditions z, by ancestral sampling in `num_sampling_steps` steps.

        With guidance (cfg other than 1) z holds two halves, conditional rows first, and the
        result repeats the tokens of the first half, so that it has a row for each of z.

        Args:
            z: (M, D) conditions.
            temperature: factor on the noise.
            cfg: guidance scale s, eps = eps_u + s (eps_c - eps_u).
            index: the frequency level, one for all rows: a number, or a tensor, which is read
                (on a GPU that waits for it); None tells the head none.
            generator: on the device of z; None is PyTorch's own.
            initial, noise: (N, P) and (T, N, P) draws, N = M or M / 2, T the number of steps; None
                draws them, in this order.

        Returns:
            (M, P) in float32 (float64 for float64 draws).

        Raises:
            ValueError: guidance for an odd number of rows; levels that differ, or one for a head
                without level input.
        """
        guided = cfg != 1.0
        if guided and len(z) % 2:
            raise ValueError(
                f"with cfg={cfg} z must hold conditional and unconditional rows, got {len(z)} rows"
            )
        rows, steps = len(z) // 2 if guided else len(z), self.num_sampling_steps
        level, head = self._level_and_head(index)
        dtype = torch.promote_types(z.dtype, torch.float32)
        if initial is None:
            initial = torch.randn(
                (rows, self.in_channels), generator=generator, device=z.device, dtype=dtype
            )
        if noise is None:
            noise = torch.randn(
                (steps, rows, self.in_channels), generator=generator, device=z.device, dtype=dtype
            )
        with self.on_backend(z):
            x_NP = denoise_loop(
                head,
                z,
                level,
                initial,
                noise,
                guidance_scale=float(cfg),
                temperature=float(temperature),
                num_timesteps=self.num_timesteps,
            )
        return torch.cat([x_NP, x_NP]) if guided else x_NP

    def _level_and_head(self, index: Tensor | float | None) -> tuple[float, Mapping[str, Tensor]]:
        """The level as a number, and the parameters of the head, with a level input in any case."""
        head: dict[str, Tensor] = dict(self.net.named_parameters())
        if index is not None and self.net.index_cond_embed is None:
            raise ValueError("this head has no level input, but got an index")
        if index is None:
            weight = head["cond_embed.weight"]
            head["index_cond_embed.weight"] = weight.new_zeros(len(weight), 1)
            head["index_cond_embed.bias"] = weight.new_zeros(len(weight))
            return 0.0, head
        if isinstance(index, Tensor):
            levels = set(index.flatten().tolist())
            if len(levels) != 1:
                raise ValueError(f"one call samples tokens of one level, got {sorted(levels)}")
            return float(levels.pop()), head
        return float(index), head


def _steps(value: int | str, num_timesteps: int) -> int:
    """The number of sampling steps; the published code takes it as text."""
    text = str(value)
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= num_timesteps):
        raise ValueError(
            f"num_sampling_steps must be a whole number in 1..{num_timesteps}, got {value!r}"
        )
    return int(text)
