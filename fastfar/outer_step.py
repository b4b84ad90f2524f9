"""One outer step of a sampling run, as a function of device tensors alone.

Unless `OuterStep.rows` is "seen", every shape follows from plan, batch and model; nothing is read
back from the device and nothing is copied to it (tables are, once: the first call puts them there).
So a step can be captured as a CUDA graph, and run again on other labels, noise and orders by
writing those into the same tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastfar.levels import unpatchify
from fastfar.model import FAR
from fastfar.moments import MomentHead, drawn
from fastfar.ops import denoise_loop, filter_mask_patchify
from fastfar.plan import SamplingPlan
from fastfar.prepared import PreparedFAR
from fastfar.profiling import annotate
from fastfar.rows import Rows, seen_rows
from fastfar.solver import Moments


@dataclass(frozen=True)
class Inputs:
    """What the steps of one run read besides its noise; tensors on the model's device.

    Attributes:
        classes_C: (C,) int64 class labels.
        class_of_B: (B,) int64, the entry of `classes_C` that each image is of. The first outer step
            costs by the class, so the fewer of them the better; but their number is a shape.
        order_BL: (B, L) int64 order of the tokens; None for a plan without masks.
    """

    classes_C: Tensor
    class_of_B: Tensor
    order_BL: Tensor | None

    @classmethod
    def of(
        cls, labels_B: Tensor, order_BL: Tensor | None, device: torch.device | str = "cpu"
    ) -> Inputs:
        """Each class once. labels_B: (B,) int64."""
        classes_C, class_of_B = torch.unique(labels_B, return_inverse=True)
        order_BL = None if order_BL is None else order_BL.to(device)
        return cls(classes_C.to(device), class_of_B.to(device), order_BL)


@dataclass(frozen=True)
class OuterStep:
    """step(k, inputs, latent, initial, noise) -> latent after outer step k.

    Attributes:
        model: as the back end runs it.
        head: its head, as the back end's `denoise_loop` takes it.
        plan: levels, masks, guidance, temperature, diffusion steps.
        dtype: compute dtype.
        rows: which tokens of the result are computed where masks hide some from the next step;
            the others are zero. See `fastfar.rows`; "seen" must not be captured.
        moments: the moment head, as the back end runs it, where the plan asks for one.
    """

    model: FAR
    head: Mapping[str, Tensor]
    plan: SamplingPlan
    dtype: torch.dtype
    rows: Rows = "fixed"
    moments: MomentHead | None = None

    @property
    def state_dtype(self) -> torch.dtype:
        """Of latents and noise."""
        return torch.promote_types(self.dtype, torch.float32)

    def latent_shape(self, batch: int) -> tuple[int, int, int, int]:
        """(B, C, H, H)."""
        config = self.model.config
        return (batch, config.latent_channels, config.latent_size, config.latent_size)

    def noise_shape(self, k: int, batch: int) -> tuple[int, int, int]:
        """(T, N, P) of outer step k; the start noise is (N, P)."""
        config = self.model.config
        return (self.plan.diffusion_steps[k], batch * config.num_tokens, config.token_dim)

    def __call__(
        self, k: int, inputs: Inputs, latent_BCHH: Tensor, initial_NP: Tensor, noise_TNP: Tensor
    ) -> Tensor:
        """Outer step k.

        Args:
            latent_BCHH: (B, C, H, H) result of the step before; not looked at by step 0.
            initial_NP: (N, P) start noise in the state dtype, N = B L.
            noise_TNP: (T, N, P) noise of the diffusion steps in the state dtype.

        Returns:
            (B, C, H, H) in the state dtype.
        """
        config, plan = self.model.config, self.plan
        rows_M = seen_rows(plan, k, config, inputs.order_BL, self.rows)
        if rows_M is not None and len(rows_M) == 0:
            return torch.zeros_like(latent_BCHH)
        with annotate("outer step", k):
            z_MD = self.condition(k, inputs, latent_BCHH).flatten(0, 1)
            if rows_M is not None:  # of both halves, with the noise that is theirs
                every_NP = torch.zeros_like(initial_NP)
                z_MD = z_MD.reshape(-1, len(every_NP), z_MD.shape[-1])[:, rows_M].flatten(0, 1)
                initial_NP, noise_TNP = initial_NP[rows_M], noise_TNP[:, rows_M]
            with annotate("level", plan.levels[k]), annotate("head"):
                x_NP = self.tokens(k, z_MD, initial_NP, noise_TNP)
            if rows_M is not None:
                x_NP = every_NP.index_copy(0, rows_M, x_NP)
            x_BLP = x_NP.view(-1, config.num_tokens, config.token_dim)
            return unpatchify(x_BLP, config.patch_size)

    def condition(self, k: int, inputs: Inputs, latent_BCHH: Tensor) -> Tensor:
        """z of outer step k, which the head samples tokens from: see `__call__`.

        Returns (B, L, D), or (2 B, L, D) with the unconditional half last where k is guided.
        """
        if k == 0:
            return self._first_condition(inputs)
        return self._condition(k, inputs, latent_BCHH)

    def tokens(
        self,
        k: int,
        z_MD: Tensor,
        initial_NP: Tensor,
        noise_TNP: Tensor,
        moments: Moments | None = None,
    ) -> Tensor:
        """(N, P) tokens given their conditions, by the solver of step k.

        moments: of the tokens, for a solver that asks for them; None: those of the moment head.
        """
        plan, solver = self.plan, self.plan.solvers[k]
        temperature = plan.temperatures[k]
        if solver.needs_moments and moments is None:
            assert self.moments is not None, "sample_latents has checked that there is one"
            moments = self.moments(z_MD, plan.levels[k], plan.guidance_scales[k])
        if solver.method == "moments":
            assert moments is not None
            return drawn(moments, initial_NP, temperature, plan.x0_range)
        return denoise_loop(
            self.head,
            z_MD,
            plan.levels[k],
            initial_NP,
            noise_TNP,
            guidance_scale=plan.guidance_scales[k],
            temperature=temperature,
            x0_range=plan.x0_range,
            num_timesteps=self.model.config.num_timesteps,
            solver=solver,
            moments=moments,
        )

    def _guided(self, k: int) -> bool:
        return self.plan.guidance_scales[k] != 1.0

    def _first_condition(self, inputs: Inputs) -> Tensor:
        """z of outer step 0, where all tokens are zero, or all masked: a function of the class.

        So the transformer sees each class once, however many images of it there are, and "no class"
        once.
        """
        model, config = self.model, self.model.config
        class_CD = model.class_embedding(inputs.classes_C)
        row_M = inputs.class_of_B
        if self._guided(0):
            row_M = torch.cat([row_M, torch.full_like(row_M, len(class_CD))])
            class_CD = torch.cat([class_CD, model.unconditional_embedding(1)])
        shape = (len(class_CD), config.num_tokens)
        zeros_CLP = class_CD.new_zeros((*shape, config.token_dim), dtype=self._token_dtype)
        if inputs.order_BL is None:
            z_CLD: Tensor = model(zeros_CLP, class_CD)
        else:
            mask_CL = torch.ones(shape, dtype=torch.bool, device=class_CD.device)
            z_CLD = model(zeros_CLP, class_CD, mask_CL, 0)
        return z_CLD[row_M]

    def _condition(self, k: int, inputs: Inputs, latent_BCHH: Tensor) -> Tensor:
        """z of a later step."""
        model, config, plan = self.model, self.model.config, self.plan
        batch = len(latent_BCHH)
        mask_BL, num_kept = None, None
        if inputs.order_BL is not None:
            num_masked = plan.num_masked(k, config.num_tokens)
            num_kept = config.num_tokens - num_masked
            mask_BL = torch.zeros_like(inputs.order_BL, dtype=torch.bool)
            mask_BL.scatter_(1, inputs.order_BL[:, :num_masked], True)
        level = plan.input_levels[k]
        tokens_BLP = filter_mask_patchify(
            latent_BCHH,
            inputs.class_of_B.new_full((batch,), -1 if level is None else level),
            mask_BL,
            patch_size=config.patch_size,
            num_levels=config.num_levels,
            kind=config.filter,
        ).to(self._token_dtype)
        class_BD = model.class_embedding(inputs.classes_C)[inputs.class_of_B]
        if self._guided(k):
            tokens_BLP = tokens_BLP.repeat(2, 1, 1)
            class_BD = torch.cat([class_BD, model.unconditional_embedding(batch)])
            mask_BL = None if mask_BL is None else mask_BL.repeat(2, 1)
        z_MLD: Tensor = model(tokens_BLP, class_BD, mask_BL, num_kept)
        return z_MLD

    @property
    def _token_dtype(self) -> torch.dtype:
        return torch.float32 if isinstance(self.model, PreparedFAR) else self.dtype
