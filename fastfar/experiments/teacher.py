"""The teacher's states: conditions from its own runs, and many of its tokens for each of them.

A swap test replaces the sampler of one outer step and leaves everything before it to the teacher,
so its conditions are those of the teacher's runs, drawn once and kept in the work folder.

Legend: S outer step, B image, L token, Z condition, N draw, P number of a token, D width of z, G
guidance half, T diffusion step.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastfar._files import atomic_write
from fastfar.data import balanced_labels
from fastfar.evaluation.samples import digest, image_generator, weights_fingerprint
from fastfar.experiments.base import Setting
from fastfar.noise import seeded_noise
from fastfar.outer_step import Inputs, OuterStep
from fastfar.plan import SamplingPlan
from fastfar.sampling import outer_steps
from fastfar.solver import Moments
from fastfar.training.moment_rows import sampled_runs

FOR_MOMENTS = 32  # of the teacher's draws: they estimate moments, and are not judged against
_ROWS = 8192  # tokens that are drawn at a time
_CHUNK = re.compile(r"(\d{6})-(\d{6})\.lat\.npy")
_TEACHER, _CANDIDATE = 1, 2  # seeds of the draws


class Teacher:
    """R's runs of the first `setting.conditions` images of the first seed, and draws from them.

    One token of every image, at a random place, gives the conditions of each outer step.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.plan = setting.teacher_plan
        self.seed, self.count = setting.seeds[0], setting.conditions
        self.labels_B = balanced_labels(self.count, setting.pipeline.model.config.num_classes)
        self.identity: dict[str, Any] = {
            "weights": setting.weights,
            "plan": self.plan.to_dict(),
            "seed": self.seed,
            "conditions": self.count,
            "draws": setting.draws,
        }
        self.folder = setting.work / "teacher" / digest(self.identity)

    # --- its runs ----------------------------------------------------------------------------

    @cached_property
    def latents_SBCHH(self) -> Tensor:
        """Latents after every outer step, float32; kept in float16."""
        found = None
        if self.setting.reference is not None:
            found = _read_latents(self.setting.reference / str(self.seed), self.count)
        if found is not None:
            return found.float()
        return torch.from_numpy(self._kept("latents", self._run)).float()

    def _run(self) -> Tensor:
        """(S, B, C, H, H) float16 of its runs."""
        setting, batches = self.setting, []
        for start in range(0, self.count, setting.batch_size):
            setting.tell(f"teacher's runs: {start} of {self.count} images")
            rows = range(start, min(start + setting.batch_size, self.count))
            runs = sampled_runs(
                setting.pipeline.model,
                self.plan,
                self.labels_B[list(rows)],
                [image_generator(self.seed, row) for row in rows],
                setting.backend,
            )
            batches.append(runs.latent_SBCHH.half())
        return torch.cat(batches, dim=1)

    def inputs(self) -> Inputs:
        """Labels and token orders of the runs."""
        config = self.setting.pipeline.model.config
        generators = [image_generator(self.seed, row) for row in range(self.count)]
        order_BL = None
        if self.plan.mask_ratios is not None:
            noise = seeded_noise(generators, self.count, config.num_tokens, config.token_dim)
            order_BL = noise.order()
        return Inputs.of(self.labels_B, order_BL)

    def whole_conditions(self, step: OuterStep, k: int) -> Tensor:
        """(G, B, L, D): z of all tokens at outer step k; G = 2 where k is guided."""
        latent_BCHH = self.latents_SBCHH[max(k - 1, 0)]
        z_MLD = step.condition(k, self.inputs(), latent_BCHH)
        return z_MLD.reshape(-1, self.count, *z_MLD.shape[1:])

    # --- conditions and draws ----------------------------------------------------------------

    @cached_property
    def token_B(self) -> Tensor:
        """Which token of each image gives the condition."""
        generator = torch.Generator().manual_seed(self.seed)
        tokens = self.setting.pipeline.model.config.num_tokens
        return torch.randint(tokens, (self.count,), generator=generator)

    def conditions(self, k: int) -> Tensor:
        """(G, Z, D) at outer step k."""

        def make() -> Tensor:
            with outer_steps(self.setting.pipeline.model, self.plan, self.setting.backend) as step:
                z_GBLD = self.whole_conditions(step, k)
            return z_GBLD[:, torch.arange(self.count), self.token_B].float()

        return torch.from_numpy(self._kept(f"conditions-{k}", make))

    def draws(self, k: int) -> Tensor:
        """(Z, N, P): the teacher's tokens."""
        return self._draws(k)[:, FOR_MOMENTS:]

    def moments(self, k: int) -> Moments:
        """Moments at temperature 1 estimated from draws that `draws` does not hold."""
        return moments_of(self._draws(k)[:, :FOR_MOMENTS], self.plan.temperatures[k])

    def _draws(self, k: int) -> Tensor:
        def make() -> Tensor:
            self.setting.tell(f"teacher's tokens at outer step {k}")
            count = FOR_MOMENTS + self.setting.draws
            return self.sample(self.plan, k, count, seed=_TEACHER).half()

        return torch.from_numpy(self._kept(f"draws-{k}", make)).float()

    def sample(
        self,
        plan: SamplingPlan,
        k: int,
        count: int,
        seed: int = _CANDIDATE,
        z_GZD: Tensor | None = None,
    ) -> Tensor:
        """(Z, count, P): tokens that `plan` draws at outer step k from the teacher's conditions.

        Where the plan asks for moments they are the pipeline's moment head's if it has one, else
        those of `moments`. z_GZD: other conditions in place of the teacher's.
        """
        z_GZD = self._halves(plan, k) if z_GZD is None else z_GZD
        generator = torch.Generator().manual_seed(1000 * seed + k)
        pieces = []
        with outer_steps(self.setting.pipeline.model, plan, self.setting.backend) as step:
            moments = None
            if plan.solvers[k].needs_moments:
                moments = self._predicted(plan, k) or self.moments(k)
            size = max(1, _ROWS // count)
            for start in range(0, self.count, size):
                part = slice(start, start + size)
                z_GND = z_GZD[:, part].repeat_interleave(count, dim=1)
                some = None if moments is None else _repeated(moments, part, count)
                x_NP = draw_tokens(step, k, z_GND, some, generator)
                pieces.append(x_NP.view(-1, count, x_NP.shape[-1]).float())
        return torch.cat(pieces)

    def _halves(self, plan: SamplingPlan, k: int) -> Tensor:
        """(G, Z, D): the conditions that `plan` uses."""
        z_GZD = self.conditions(k)
        guided = plan.guidance_scales[k] != 1.0
        if guided and len(z_GZD) == 1:
            raise ValueError(f"the teacher is not guided at outer step {k}: it has no second half")
        return z_GZD if guided else z_GZD[:1]

    def moment_source(self) -> str:
        """What moments are from: part of a row's key."""
        head = self.setting.pipeline.moments
        return f"{FOR_MOMENTS} draws" if head is None else weights_fingerprint(head)

    def _predicted(self, plan: SamplingPlan, k: int) -> Moments | None:
        head = self.setting.pipeline.moments
        if head is None:
            return None
        head.check(plan)
        z_MD = self._halves(plan, k).flatten(0, 1)
        predicted: Moments = head(z_MD, plan.levels[k], plan.guidance_scales[k])
        return predicted

    def _kept(self, name: str, make: Any) -> np.ndarray[Any, Any]:
        """The array of this name, made and written if it is not there."""
        file = self.folder / f"{name}.npy"
        if not file.is_file():
            made = make()
            with atomic_write(file) as temporary, open(temporary, "wb") as stream:
                np.save(stream, made.numpy())
        array: np.ndarray[Any, Any] = np.load(file, allow_pickle=False)
        return array


def draw_tokens(
    step: OuterStep, k: int, z_GND: Tensor, moments: Moments | None, generator: torch.Generator
) -> Tensor:
    """(N, P): one token for each condition, as outer step k of the plan draws it."""
    plan, config = step.plan, step.model.config
    shape = (z_GND.shape[1], config.token_dim)
    initial_NP = torch.randn(shape, generator=generator)
    steps = 0 if plan.solvers[k].method == "moments" else plan.diffusion_steps[k]
    noise_TNP = torch.randn(steps, *shape, generator=generator)
    return step.tokens(k, z_GND.flatten(0, 1), initial_NP, noise_TNP, moments)


def moments_of(draws_ZNP: Tensor, temperature: float) -> Moments:
    """Mean and covariance of every condition's draws, at temperature 1.

    The basis holds the eigenvectors of the mean covariance; within it, covariances are left out.
    """
    mean_Z1P = draws_ZNP.mean(dim=1, keepdim=True)
    residual_ZNP = draws_ZNP - mean_Z1P
    covariance_PP = torch.einsum("znp,znq->pq", residual_ZNP, residual_ZNP)
    basis_PP = torch.linalg.eigh(covariance_PP.double()).eigenvectors.to(draws_ZNP)
    variance_ZP = (residual_ZNP @ basis_PP).square().sum(dim=1) / (draws_ZNP.shape[1] - 1)
    return Moments(mean_Z1P[:, 0], variance_ZP / temperature**2, basis_PP)


def _repeated(moments: Moments, part: slice, count: int) -> Moments:
    mean_NP, variance_NP = (
        each[part].repeat_interleave(count, dim=0)
        for each in (moments.mean_NP, moments.variance_NP)
    )
    return Moments(mean_NP, variance_NP, moments.basis_PP)


def _read_latents(folder: Path, count: int) -> Tensor | None:
    """(S, count, C, H, H) float16 of NNNNNN-NNNNNN.lat.npy files; None if some are missing."""
    chunks, reached = [], 0
    for file in sorted(folder.glob("*.lat.npy")):
        match = _CHUNK.fullmatch(file.name)
        if match is None or int(match[1]) != reached or reached >= count:
            continue
        chunks.append(torch.from_numpy(np.load(file, allow_pickle=False)))
        reached = int(match[2])
    return torch.cat(chunks, dim=1)[:, :count] if reached >= count else None


def swapped(teacher: SamplingPlan, plan: SamplingPlan, k: int) -> dict[str, Any]:
    """What a token row of outer step k depends on: the step alone, so that candidates share it."""
    names = ("levels", "temperatures", "diffusion_steps")
    said: dict[str, Any] = {name: getattr(plan, name)[k] for name in names}
    said |= {"scale": plan.guidance_scales[k], "solver": plan.solvers[k].to_dict()}
    return {**said, "x0_range": plan.x0_range, "teacher": teacher.diffusion_steps[k]}
