"""VAR, MAR and LlamaGen as subjects. See `fastfar.bench.subjects.Subject`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastfar.baselines import Baseline
from fastfar.baselines.mar import MAR
from fastfar.bench.far import HALF, SEED, labels_of
from fastfar.bench.flops import published_flops
from fastfar.bench.gate import Gate
from fastfar.bench.probes import check

FLOAT32 = ("var", "mar")  # families that are published with float32 weights
DECODER_BYTES = 300 << 20
FORM_TITLES = {"published": "as published", "well_run": "well run"}


class BaselineSubject:
    """A baseline in one of its forms.

    Args:
        baseline: what is run.
        timed_steps: where its steps can be extrapolated (MAR's 256), how many of them are run:
            the middles of as many equal parts of all steps.
        forced: whether its dtype was asked for, and so belongs into the key.
    """

    def __init__(self, baseline: Baseline, timed_steps: int, forced: bool = False) -> None:
        self.baseline = baseline
        self.model, self.form = baseline.name, baseline.form
        self.dtype, self.device = baseline.dtype, baseline.device
        short = str(baseline.dtype).removeprefix("torch.")
        self.key = f"{baseline.name}/{baseline.form}" + (f"/{short}" if forced else "")
        self.title = f"{baseline.title} {FORM_TITLES[baseline.form]}"
        self.steps, self.num_parameters = baseline.steps, baseline.num_parameters
        self.random_weights, self.ways = baseline.random_weights, baseline.ways
        self.shape = "256 x 256 pixels"
        self.plan_name = self.plan_mode = "published"
        self.timed_steps: tuple[int, ...] | None = None
        self.extrapolation: str | None = None
        if baseline.extrapolates and timed_steps < baseline.steps:
            count, steps = timed_steps, baseline.steps
            self.timed_steps = tuple((2 * i + 1) * steps // (2 * count) for i in range(count))
            self.extrapolation = (
                f"{count} of {steps} steps were run and timed one by one "
                f"({', '.join(map(str, self.timed_steps))}); each stands for its "
                f"neighbours, {steps} in all; decoding was run whole"
            )

    @property
    def mode(self) -> str:
        """Honesty mode."""
        if self.form == "published" and self.dtype in HALF:
            return "as published"
        return "exact" if self.dtype in HALF else "parity"

    @property
    def plan(self) -> dict[str, Any] | None:
        """Steps and guidance, as published."""
        return {
            "steps": self.steps,
            "guidance_scale": self.baseline.guidance_scale,
            "timed_steps": self.timed_steps,
        }

    def labels(self, batch: int) -> Tensor:
        """Classes 0, 1, 2, ..."""
        return labels_of(batch, 1000)

    def draw(self, batch: int) -> None:
        """Nothing: its random numbers are drawn as it runs, from a generator of the same seed."""

    def generator(self) -> torch.Generator:
        """Of a run, in the same state each time."""
        return torch.Generator(self.device).manual_seed(SEED)

    def run(self, labels_B: Tensor, source: None = None) -> Tensor:
        """Tokens; where steps are extrapolated, of a run of which only some steps compute."""
        return self.baseline.tokens(
            labels_B, generator=self.generator(), timed_steps=self.timed_steps
        )

    def timed_run(self, labels_B: Tensor, source: None = None) -> tuple[Tensor, float]:
        """Tokens, and the seconds of all steps: those that were timed times what they stand for."""
        tokens = self.run(labels_B)
        if not isinstance(self.baseline, MAR):
            raise ValueError(f"{self.title} runs all of its steps: time it as a whole")
        return tokens, self.baseline.extrapolated_seconds()

    def decode(self, tokens: Tensor) -> Tensor:
        """Images in [0, 1]."""
        return self.baseline.decode(tokens)

    def check(self) -> Gate:
        """See `fastfar.bench.probes`."""
        return check(self.baseline)

    def reference_flops(self, batch: int) -> int:
        """Products of the published form, counted on tensors without memory."""
        return batch * published_flops(self.model)

    def executed_flops(self, batch: int) -> int | None:
        """The same: both forms multiply what was published."""
        return batch * published_flops(self.model)

    def weight_bytes(self) -> int:
        """About what its weights take: as published VAR and MAR hold float32 ones."""
        published = self.form == "published" and self.model.split("_")[0] in FLOAT32
        itemsize = 4 if published else self.dtype.itemsize
        return self.num_parameters * itemsize + DECODER_BYTES
