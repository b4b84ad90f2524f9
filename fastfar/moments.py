"""The moment head: mean and covariance of a guided token in one call of a small network.

FAR low-passes all results but the last one, which averages the noise of many tokens: what is left
of a token there is its mean and its covariance. This head predicts both, of the tokens that the
denoising MLP would sample with guidance,

    h = W_c z_c + W_u z_u + e_level + w_g (s - 1);  h <- h + MLP(LN(h));  o = W LN(h) + b
    m = mean_level + A_level o_1,    C = variance_level exp(o_2) + 1e-5

so that x ~ N(m, U_level diag(C) U_level^T). The fixed tables of each level are taken from the data:
mean_level and A_level from the tokens, U_level (eigenvectors) and variance_level from what the mean
leaves over. C is the covariance at temperature 1: spread is proportional to temperature.

`fastfar.training.moments` trains it on a model's own sampling runs. It belongs to that model and to
the levels and guidance of that plan, and is refused with others.

Source: fastfar's own; GIVT (arXiv 2312.02116) predicts a token's mean and variance in this way.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastfar._files import atomic_write
from fastfar._tables import fingerprint, finish
from fastfar.config import FARConfig
from fastfar.ops import layernorm_linear, layernorm_mlp_residual, linear
from fastfar.packing import packed
from fastfar.plan import SamplingPlan
from fastfar.solver import Moments

FORMAT = "fastfar-moments"
FORMAT_VERSION = 1
FILE = "moments.safetensors"
EPS = 1e-6
MLP_RATIO = 4
# Of every direction of a token: far below what a pixel shows, and the loss stays bounded where
# the teacher's tokens are all the same (background).
MIN_VARIANCE = 1e-5


@dataclass(frozen=True)
class MomentConfig:
    """Sizes. ValueError for a number below 1.

    Attributes:
        token_dim: P, numbers per token.
        condition_width: D, width of the transformer's output.
        num_levels: K; levels are 0..K.
        width: W. depth: number of blocks.
    """

    token_dim: int
    condition_width: int
    num_levels: int
    width: int = 256
    depth: int = 2

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


@dataclass(frozen=True)
class Trained:
    """What a moment head was trained on, and what it may be used for.

    Attributes:
        teacher: fingerprint of the model's weights (`fastfar._weights.weights_digest`).
        plan: of the sampling runs; None before training.
        report: figures of the training, by name.
    """

    teacher: str = ""
    plan: SamplingPlan | None = None
    report: Mapping[str, Any] = field(default_factory=dict)


class _Block(nn.Module):
    """h + W_2 gelu(W_1 LN(h) + b_1) + b_2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.fc1 = nn.Linear(width, MLP_RATIO * width)
        self.fc2 = nn.Linear(MLP_RATIO * width, width)

    def forward(self, h_NW: Tensor) -> Tensor:
        return layernorm_mlp_residual(
            h_NW,
            self.norm.weight,
            self.norm.bias,
            self.fc1.weight,
            self.fc1.bias,
            self.fc2.weight,
            self.fc2.bias,
            eps=EPS,
        )


class MomentHead(nn.Module):
    """Maps (z_c, z_u, level, guidance scale) of every token to its mean and covariance.

    Args:
        config: sizes.
        trained: what it was trained on.

    Attributes:
        mean_KP, map_KPP: mean_level and A_level of the module's text, K + 1 levels.
        basis_KPP, variance_KP: U_level (columns are axes) and variance_level.

    Example:
        >>> head = MomentHead(MomentConfig(token_dim=16, condition_width=192, num_levels=16))
        >>> moments = head(torch.zeros(2 * 64, 192), level=4, guidance_scale=1.5)
        >>> moments.mean_NP.shape
        torch.Size([64, 16])
    """

    def __init__(self, config: MomentConfig, trained: Trained | None = None) -> None:
        super().__init__()
        self.config = config
        self.trained = Trained() if trained is None else trained
        width, numbers, levels = config.width, config.token_dim, config.num_levels + 1
        self.condition = nn.Linear(config.condition_width, width)
        self.unconditional = nn.Linear(config.condition_width, width)
        self.level = nn.Embedding(levels, width)
        self.guidance = nn.Parameter(torch.zeros(width))
        self.blocks = nn.ModuleList(_Block(width) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.output = nn.Linear(width, 2 * numbers)
        nn.init.normal_(self.level.weight, std=0.02)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        identity = torch.eye(numbers).repeat(levels, 1, 1)
        self.register_buffer("mean_KP", torch.zeros(levels, numbers))
        self.register_buffer("map_KPP", identity.clone())
        self.register_buffer("basis_KPP", identity.clone())
        self.register_buffer("variance_KP", torch.ones(levels, numbers))

    mean_KP: Tensor
    map_KPP: Tensor
    basis_KPP: Tensor
    variance_KP: Tensor

    def forward(self, condition_MD: Tensor, level: int, guidance_scale: float) -> Moments:
        """Moments of N tokens at one level.

        Args:
            condition_MD: (2 N, D), conditional rows first; or (N, D), which is no guidance: z_u is
                z_c there, as it is for a scale of 1.
            level: of the tokens.
            guidance_scale: s.

        Returns:
            (N, P), (N, P), (P, P), float32.

        Raises:
            ValueError: conditions of another width, or a level that the head does not have.
        """
        config = self.config
        if condition_MD.shape[-1] != config.condition_width or not 0 <= level <= config.num_levels:
            raise ValueError(
                f"this moment head takes conditions of width {config.condition_width} and levels "
                f"0..{config.num_levels}, got width {condition_MD.shape[-1]} and level {level}"
            )
        z_c, z_u = condition_MD, condition_MD
        if guidance_scale != 1.0:
            z_c, z_u = condition_MD.chunk(2)
        return self.moments(z_c, z_u, level, guidance_scale)

    def moments(
        self,
        z_c_NRD: Tensor,
        z_u_NRD: Tensor,
        level: int | Tensor,
        guidance_scale: float | Tensor,
    ) -> Moments:
        """`forward` of conditions that lie apart.

        Several levels at once: conditions (S, R, D), level (S,), guidance_scale (S, 1, 1); the
        results have an axis of S as well.
        """
        dtype = self.condition.bias.dtype
        h_NW = linear(z_c_NRD.to(dtype), self.condition.weight, self.condition.bias)
        h_NW = h_NW + linear(z_u_NRD.to(dtype), self.unconditional.weight, self.unconditional.bias)
        h_NW = h_NW + self.level.weight[level].unsqueeze(-2)
        h_NW = h_NW + (guidance_scale - 1.0) * self.guidance
        for block in self.blocks:
            h_NW = block(h_NW)
        # The last layer in float32: a mean is copied into all later levels.
        with torch.autocast(h_NW.device.type, enabled=False):
            out_N2P = layernorm_linear(
                h_NW.float(),
                self.norm.weight,
                self.norm.bias,
                self.output.weight,
                self.output.bias,
                eps=EPS,
            )
            shift_NP, log_ratio_NP = out_N2P.chunk(2, dim=-1)
            shift_NP = shift_NP @ self.map_KPP[level].mT
            mean_NP = self.mean_KP[level].unsqueeze(-2) + shift_NP
            variance_NP = self.variance_KP[level].unsqueeze(-2) * log_ratio_NP.exp()
        return Moments(mean_NP, variance_NP + MIN_VARIANCE, self.basis_KPP[level])

    # --- what it may be used for -------------------------------------------------------------

    def check_teacher(self, teacher: str, where: str = "") -> None:
        """ValueError unless the head was trained for the model with this fingerprint."""
        if teacher != self.trained.teacher:
            raise ValueError(
                f"{where}this moment head was trained for the model with the fingerprint "
                f"{self.trained.teacher or 'of none'}, this model's is {teacher}: train one for it "
                "(fastfar.training.moments), or leave the moment head out"
            )

    def check(self, plan: SamplingPlan, config: FARConfig | None = None) -> None:
        """ValueError unless the head was trained for every step of `plan` that asks for moments.

        Diffusion steps, solvers, temperatures and mask ratios may differ from the training's plan,
        and steps may be left out; levels, their inputs, masking, guidance and x0_range may not.
        config: of the model that it is to be used with, which has to have the same sizes.
        """
        if config is not None:
            sizes = (config.token_dim, config.width, config.num_levels)
            own_sizes = (
                self.config.token_dim,
                self.config.condition_width,
                self.config.num_levels,
            )
            if sizes != own_sizes:
                raise ValueError(
                    f"this moment head is for a model with (token_dim, width, num_levels) = "
                    f"{own_sizes}, this one has {sizes}: give the head of this model"
                )
        own = self.trained.plan
        if own is None:
            raise ValueError("this moment head is not trained: see fastfar.training.moments")
        wanted = [k for k, solver in enumerate(plan.solvers) if solver.needs_moments]
        if not wanted:
            return
        advice = "train one for this plan (fastfar.training.moments), or use other solvers there"
        for name in ("x0_range", "mask_ratios"):
            asked, had = getattr(plan, name), getattr(own, name)
            if name == "mask_ratios":
                asked, had = asked is not None, had is not None
            if asked != had:
                raise ValueError(
                    f"this moment head was trained for a plan with {name.replace('_', ' ')} {had}, "
                    f"the plan has {asked}; {advice}"
                )
        for k in wanted:
            place = _place(plan, k)
            scales = [s for j, s in enumerate(own.guidance_scales) if _place(own, j) == place]
            if not scales:
                places = sorted({_place(own, j) for j in range(len(own))}, key=str)
                raise ValueError(
                    f"outer step {k} asks for moments at (level, input level) {place}; this moment "
                    f"head was trained at {places}: {advice}"
                )
            scale = plan.guidance_scales[k]
            low, high = min(scales), max(scales)
            if not low - 1e-6 <= scale <= high + 1e-6:
                raise ValueError(
                    f"outer step {k} asks for moments with guidance scale {scale:.4g} at level "
                    f"{place[0]}; this moment head was trained with {low:.4g}..{high:.4g} there "
                    f"(guidance_scale={own.guidance_scale:g}): {advice}"
                )

    # --- files -------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> None:
        """Write one safetensors file, atomically: weights, sizes, and what it was trained on.

        dtype: of the stored weights; tables of the levels stay float32, as does what is loaded.
        """
        plan = self.trained.plan
        described = {
            "version": FORMAT_VERSION,
            "config": dataclasses.asdict(self.config),
            "teacher": self.trained.teacher,
            "plan": None if plan is None else plan.to_dict(),
            "report": dict(self.trained.report),
        }
        weights = {name for name, _ in self.named_parameters()}
        tensors = {
            name: t.detach().cpu().to(dtype if name in weights else torch.float32).contiguous()
            for name, t in self.state_dict().items()
        }
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, {"format": FORMAT, "moments": json.dumps(described)})

    @classmethod
    def load(cls, path: str | os.PathLike[str], teacher: str | None = None) -> MomentHead:
        """Read a file of `save`; in eval mode, on the CPU.

        Args:
            teacher: fingerprint of the model that it is to be used with
                (`fastfar._weights.weights_digest`); None reads the file, whatever model it is of.

        Raises:
            FileNotFoundError: no such file.
            ValueError: another kind of file or a damaged one; it was trained for another model.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no moment head {path}: see fastfar.training.moments")
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if metadata.get("format") != FORMAT:
                raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
            values = json.loads(metadata["moments"])
            if values["version"] != FORMAT_VERSION:
                raise ValueError(f"its version is {values['version']}, this one {FORMAT_VERSION}")
            plan = None if values["plan"] is None else SamplingPlan.from_dict(values["plan"])
            trained = Trained(values["teacher"], plan, values["report"])
            head = cls(MomentConfig(**values["config"]), trained)
            head.load_state_dict(tensors)
        except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"{path} is no moment head that can be read: {error}") from error
        if teacher is not None:
            head.check_teacher(teacher, f"{path}: ")
        return head.eval().requires_grad_(False)

    def prepared(
        self, backend: str, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> MomentHead:
        """A copy as `backend` runs it: the products of its blocks in `dtype`, the rest float32."""
        copied = copy.deepcopy(self).to(device).eval().requires_grad_(False)
        layers = [copied.condition, copied.unconditional]
        layers += [each for each in copied.blocks.modules() if isinstance(each, nn.Linear)]
        if backend == "native":
            for layer in layers:
                weight = layer.weight
                del layer.weight  # a parameter; what takes its place is a plain attribute
                layer.weight = packed(weight, dtype)
        else:
            for part in (*layers, copied.level, *copied.blocks):
                part.to(dtype)
            copied.guidance.data = copied.guidance.data.to(dtype)
        return copied


_copies: weakref.WeakKeyDictionary[MomentHead, tuple[object, MomentHead]] = (
    weakref.WeakKeyDictionary()
)
_copying = threading.Lock()


def prepared_moments(
    head: MomentHead, backend: str, dtype: torch.dtype, device: torch.device
) -> MomentHead:
    """`head.prepared`, kept until the head is gone, its weights change or another is asked for."""
    made_for = (backend, dtype, device, fingerprint(head.state_dict().values()))
    with _copying:
        kept = _copies.get(head)
        if kept is None or kept[0] != made_for:
            kept = _copies[head] = (made_for, head.prepared(backend, dtype, device))
            finish(device)  # other threads read it on streams of their own
    return kept[1]


def drawn(
    moments: Moments,
    noise_NP: Tensor,
    temperature: float,
    x0_range: tuple[float, float] | None = None,
) -> Tensor:
    """Tokens x = m + temperature U (sqrt(C) n), bounded to x0_range; dtype of the noise.

    noise_NP: (N, P), standard normal.
    """
    spread_NP = temperature * moments.variance_NP.sqrt().to(noise_NP) * noise_NP
    x_NP = moments.mean_NP.to(noise_NP) + spread_NP @ moments.basis_PP.mT.to(noise_NP)
    return x_NP if x0_range is None else x_NP.clamp(*x0_range)


def _place(plan: SamplingPlan, k: int) -> tuple[int, int | None]:
    """(level, input level) of outer step k; the first step has no input."""
    return plan.levels[k], plan.input_levels[k] if k > 0 else None
