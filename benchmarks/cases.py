"""One case per op: what it is called with inside a model, and what that costs at least.

Every size comes from a `FARConfig`. FLOPs are those of matrix products, two per multiply-add, and
are told twice: `flops` for the arithmetic as published, `executed_flops` for what the production op
has to do (work that it hoists or skips is not counted). `bytes_moved` reads every input and writes
the output once. M = 2 N rows or images stand for the two halves of guidance.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastfar import FARConfig, ops, reference
from fastfar.head import TIME_FEATURES, DenoisingMLP
from fastfar.ops._head import pack_head
from fastfar.packing import packed

STEPS = 8  # T of the denoising loop: its time is linear in T, and a short loop keeps runs short
PRESETS = ("demo", "far_base")

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Count = Callable[[FARConfig, int], int]


@dataclass(frozen=True)
class Case:
    """An op of the model, ready to be called and counted.

    Attributes:
        name: of the op, in `fastfar.ops` and in `fastfar.reference`.
        make: (config, batch, dtype) -> (args, kwargs) of the call that sampling or training makes.
        flops: (config, batch) -> FLOPs of the published arithmetic; 0 where there is no product.
        executed: the same for the production op; None where it is the same number.
    """

    name: str
    make: Callable[[FARConfig, int, torch.dtype], Arguments]
    flops: Count
    executed: Count | None = None

    @property
    def op(self) -> ops.Op[..., Tensor]:
        """The production op."""
        operation: ops.Op[..., Tensor] = getattr(ops, self.name)
        return operation

    @property
    def reference(self) -> Callable[..., Tensor]:
        """The truth."""
        function: Callable[..., Tensor] = getattr(reference, self.name)
        return function

    def inputs(self, config: FARConfig, batch: int, dtype: torch.dtype, seed: int = 0) -> Arguments:
        """Arguments of the op for `batch` images; the same numbers for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make(config, batch, dtype)

    def native_inputs(self, config: FARConfig, batch: int, dtype: torch.dtype) -> Arguments:
        """The same numbers as a model that is packed for the native back end passes them.

        Matrices of weights are packed in `dtype` and all else is float32; an op without weights
        gets its tensors in `dtype`.
        """
        args, kwargs = self.inputs(config, batch, torch.float32)
        if self.name == "denoise_loop":
            head, *rest = args
            return (pack_head(head, dtype), *rest), kwargs
        names = list(inspect.signature(self.op).parameters)[: len(args)]
        weights = {
            name
            for name, x in zip(names, args, strict=True)
            if name.endswith("weight") and isinstance(x, Tensor) and x.ndim == 2
        }
        others = torch.float32 if weights else dtype
        return tuple(
            packed(x, dtype) if name in weights else as_float(x, others)
            for name, x in zip(names, args, strict=True)
        ), kwargs

    def executed_flops(self, config: FARConfig, batch: int) -> int:
        """FLOPs that the production op executes."""
        return (self.executed or self.flops)(config, batch)

    @staticmethod
    def bytes_moved(arguments: Arguments, out: Any) -> int:
        """Bytes of all inputs and of the outputs: the least traffic with memory."""
        tensors = [x for x in tree_leaves((arguments, out)) if isinstance(x, Tensor)]
        return sum(x.numel() * x.element_size() for x in tensors)


def as_float(x: Any, dtype: torch.dtype) -> Any:
    """Tensors of real numbers, also those inside a dictionary, in `dtype`; all else as it is."""
    if isinstance(x, Mapping):
        return {key: as_float(value, dtype) for key, value in x.items()}
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def _positions(config: FARConfig) -> int:
    return config.buffer_size + config.num_tokens


def _matrix(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(rows, columns) / math.sqrt(columns)).to(dtype)


def _vector(size: int, dtype: torch.dtype, mean: float = 0.0) -> Tensor:
    return (mean + 0.1 * torch.randn(size)).to(dtype)


def _attention(config: FARConfig, batch: int, dtype: torch.dtype) -> Arguments:
    heads, length = config.num_heads, _positions(config)
    qkv = torch.randn(2 * batch, length, 3, heads, config.width // heads)
    return (qkv.to(dtype),), {}


def _layernorm_attention_residual(config: FARConfig, batch: int, dtype: torch.dtype) -> Arguments:
    width = config.width
    args = (
        torch.randn(2 * batch, _positions(config), width).to(dtype),
        _vector(width, dtype, mean=1.0),
        _vector(width, dtype),
        _matrix(3 * width, width, dtype),
        _vector(3 * width, dtype),
        _matrix(width, width, dtype),
        _vector(width, dtype),
    )
    return args, {"num_heads": config.num_heads}


def _layernorm_linear(config: FARConfig, batch: int, dtype: torch.dtype) -> Arguments:
    width = config.width
    args = (
        torch.randn(2 * batch, _positions(config), width).to(dtype),
        _vector(width, dtype, mean=1.0),
        _vector(width, dtype),
        _matrix(width, width, dtype),
        _vector(width, dtype),
    )
    return args, {}


def _linear(config: FARConfig, batch: int, dtype: torch.dtype) -> Arguments:
    width, rows = config.head_width, 2 * batch * config.num_tokens
    x_NW = torch.randn(rows, width).to(dtype)
    return (x_NW, _matrix(3 * width, width, dtype), _vector(3 * width, dtype)), {}


def _layernorm_mlp_residual(config: FARConfig, batch: int, dtype: torch.dtype) -> Arguments:
    width, hidden = config.width, config.mlp_ratio * config.width
    args = (
        torch.randn(2 * batch, _positions(config), width).to(dtype),
        _vector(width, dtype, mean=1.0),
        _vector(width, dtype),
        _matrix(hidden, width, dtype),
        _vector(hidden, dtype),
        _matrix(width, hidden, dtype),
        _vector(width, dtype),
    )
    return args, {}


def _residual_layernorm(config: FARConfig, batch: int, dtype: torch.dtype) -> Arguments:
    width, rows = config.width, 2 * batch * _positions(config)
    x_ND, update_ND = torch.randn(2, rows, width).to(dtype)
    return (x_ND, update_ND, _vector(width, dtype, mean=1.0), _vector(width, dtype)), {}


def _transformer_block(config: FARConfig, batch: int, dtype: torch.dtype) -> Arguments:
    first, kwargs = _layernorm_attention_residual(config, batch, dtype)
    (_, *second), _ = _layernorm_mlp_residual(config, batch, dtype)
    return (*first, *second), kwargs


def _adaln_mlp_block(config: FARConfig, batch: int, dtype: torch.dtype) -> Arguments:
    width, rows = config.head_width, 2 * batch * config.num_tokens
    args = (
        *(torch.randn(rows, width).to(dtype) for _ in range(4)),
        _vector(width, dtype, mean=1.0),
        _vector(width, dtype),
        _matrix(width, width, dtype),
        _vector(width, dtype),
        _matrix(width, width, dtype),
        _vector(width, dtype),
    )
    return args, {}


def head_inputs(
    config: FARConfig, tokens: int, steps: int, dtype: torch.dtype, halves: int = 2
) -> Arguments:
    """A random denoising MLP and what `denoise_loop` takes with it, guided if `halves` is 2."""
    numbers = config.token_dim
    with torch.device("meta"):
        shapes = DenoisingMLP(config).state_dict()
    head = {
        name: _matrix(*x.shape, dtype) if x.ndim == 2 else _vector(len(x), dtype)
        for name, x in shapes.items()
    }
    # As after training, the variance channel stays near -1..1: outside, the noise explodes.
    head["final_layer.linear.weight"] *= 0.1
    args = (
        head,
        torch.randn(halves * tokens, config.width).to(dtype),
        config.num_levels // 2,
        torch.randn(tokens, numbers).to(dtype),
        torch.randn(steps, tokens, numbers).to(dtype),
    )
    # Bounded, as random weights would let the tokens grow without limit.
    return args, {"guidance_scale": 3.0, "temperature": 1.0, "x0_range": (-3.0, 3.0)}


def _denoise_loop(config: FARConfig, batch: int, dtype: torch.dtype) -> Arguments:
    return head_inputs(config, batch * config.num_tokens, STEPS, dtype)


def _denoise_loop_flops(config: FARConfig, batch: int) -> int:
    rows, width = 2 * batch * config.num_tokens, config.head_width
    condition = TIME_FEATURES * width + width**2 + config.width * width + width
    body = (5 * config.head_depth + 2) * width**2 + 3 * config.token_dim * width
    return STEPS * 2 * rows * (condition + body)


def _denoise_loop_executed(config: FARConfig, batch: int) -> int:
    """Condition once per row, time once per step, eps of both halves, variance of one."""
    rows, width = batch * config.num_tokens, config.head_width
    once = STEPS * (TIME_FEATURES * width + width**2) + 2 * rows * config.width * width + width
    modulated = 2 * rows * (5 * config.head_depth + 2) * width**2
    return 2 * (once + STEPS * (modulated + 4 * rows * config.token_dim * width))


def _filter_mask_patchify(config: FARConfig, batch: int, dtype: torch.dtype) -> Arguments:
    size = config.latent_size
    latent = torch.randn(batch, config.latent_channels, size, size).to(dtype)
    level = torch.arange(batch) % (config.num_levels - 1) + 1
    mask = torch.rand(batch, config.num_tokens) < 0.5
    kwargs = {
        "patch_size": config.patch_size,
        "num_levels": config.num_levels,
        "kind": config.filter,
    }
    return (latent, level, mask), kwargs


def _hybrid_loss(config: FARConfig, batch: int, dtype: torch.dtype) -> Arguments:
    rows, numbers = 4 * batch * config.num_tokens, config.token_dim  # batch multiplier 4
    timestep = torch.randint(config.num_timesteps, (rows,))
    target, noise = torch.randn(2, rows, numbers)
    schedule = reference.make_schedule(config.num_timesteps)
    noised = reference.q_sample(target, noise, timestep, schedule)
    output = torch.randn(rows, 2 * numbers)
    tensors = (x.to(dtype) for x in (output, target, noise, noised))
    return (*tensors, timestep), {"num_timesteps": config.num_timesteps}


def _add_noise(config: FARConfig, batch: int, dtype: torch.dtype) -> Arguments:
    tokens, numbers = batch * config.num_tokens, config.token_dim
    x0, noise = torch.randn(tokens, numbers), torch.randn(4 * tokens, numbers)
    timestep = torch.randint(config.num_timesteps, (4 * tokens,))
    return (x0.to(dtype), noise.to(dtype), timestep), {"num_timesteps": config.num_timesteps}


# KL-16's decoder at its lowest resolution, where a third of its layers are.
KL_WIDTH, KL_GROUPS = 512, 32


def _image(config: FARConfig, batch: int, dtype: torch.dtype) -> Tensor:
    x_BCHW = torch.randn(batch, KL_WIDTH, config.latent_size, config.latent_size)
    return x_BCHW.to(dtype, memory_format=torch.channels_last)


def _convolution_weights(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight = _matrix(KL_WIDTH, KL_WIDTH * 9, dtype).view(KL_WIDTH, KL_WIDTH, 3, 3)
    return weight, _vector(KL_WIDTH, dtype)


def _groupnorm_silu(config: FARConfig, batch: int, dtype: torch.dtype) -> Arguments:
    vectors = _vector(KL_WIDTH, dtype, mean=1.0), _vector(KL_WIDTH, dtype)
    return (_image(config, batch, dtype), *vectors), {"groups": KL_GROUPS}


def _convolution_residual(config: FARConfig, batch: int, dtype: torch.dtype) -> Arguments:
    x, residual = _image(config, batch, dtype), _image(config, batch, dtype)
    return (x, *_convolution_weights(dtype), residual), {}


def _upsample_convolution(config: FARConfig, batch: int, dtype: torch.dtype) -> Arguments:
    return (_image(config, batch, dtype), *_convolution_weights(dtype)), {}


CASES = {
    case.name: case
    for case in (
        Case(
            "filter_mask_patchify",
            _filter_mask_patchify,
            lambda c, batch: 4 * batch * c.latent_channels * c.latent_size**3,
        ),
        Case(
            "attention",
            _attention,
            lambda c, batch: 2 * batch * 4 * _positions(c) ** 2 * c.width,
        ),
        Case(
            "layernorm_attention_residual",
            _layernorm_attention_residual,
            lambda c, batch: (
                2 * batch * _positions(c) * (8 * c.width**2 + 4 * _positions(c) * c.width)
            ),
        ),
        Case(
            "layernorm_linear",
            _layernorm_linear,
            lambda c, batch: 2 * batch * _positions(c) * 2 * c.width**2,
        ),
        Case(
            "layernorm_mlp_residual",
            _layernorm_mlp_residual,
            lambda c, batch: 2 * batch * _positions(c) * 4 * c.mlp_ratio * c.width**2,
        ),
        Case("residual_layernorm", _residual_layernorm, lambda c, batch: 0),
        Case(
            "transformer_block",
            _transformer_block,
            lambda c, batch: (
                2 * batch * _positions(c) * (24 * c.width**2 + 4 * _positions(c) * c.width)
            ),
        ),
        Case(
            "adaln_mlp_block",
            _adaln_mlp_block,
            lambda c, batch: 2 * batch * c.num_tokens * 4 * c.head_width**2,
        ),
        Case(
            "linear",
            _linear,
            lambda c, batch: 2 * batch * c.num_tokens * 6 * c.head_width**2,
        ),
        Case("denoise_loop", _denoise_loop, _denoise_loop_flops, _denoise_loop_executed),
        Case("hybrid_loss", _hybrid_loss, lambda c, batch: 0),
        Case("add_noise", _add_noise, lambda c, batch: 0),
        Case("groupnorm_silu", _groupnorm_silu, lambda c, batch: 0),
        Case(
            "convolution_residual",
            _convolution_residual,
            lambda c, batch: 2 * batch * c.latent_size**2 * 9 * KL_WIDTH**2,
        ),
        Case(
            "upsample_convolution",
            _upsample_convolution,
            lambda c, batch: 2 * batch * 4 * c.latent_size**2 * 9 * KL_WIDTH**2,
        ),
    )
}
