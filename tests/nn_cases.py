"""Every module of fastfar.nn with inputs, and what it should compute, by fastfar.reference."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from formula import fill_by_formula
from tolerances import relative
from torch import Tensor, nn

from fastfar import reference
from fastfar.nn import Block, DiffLoss, FilterMaskPatchify, FinalLayer, ResBlock, SimpleMLPAdaLN

ROWS, TOKEN, WIDTH, CONDITION = 5, 3, 8, 6
TIMESTEP = torch.tensor([3, 17, 500, 998, 999])  # t = 0 is ill-conditioned; the op's test has it
LEVEL = torch.arange(ROWS)[:, None] % 3  # (N, 1), as the published code gives it
norm = partial(nn.LayerNorm, eps=1e-6)

Inputs = dict[str, Tensor]
Case = tuple[Callable[..., nn.Module], Callable[[], Inputs], Callable[..., Tensor]]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def pair(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor) and isinstance(bias, Tensor)
    return weight, bias


# --- what each should compute ----------------------------------------------------------------


def res_block(m: ResBlock, x: Tensor, y: Tensor) -> Tensor:
    parts = F.linear(F.silu(y), *pair(m.adaLN_modulation[1])).chunk(3, dim=-1)
    return reference.adaln_mlp_block(x, *parts, *pair(m.in_ln), *pair(m.mlp[0]), *pair(m.mlp[2]))


def final_layer(m: FinalLayer, x: Tensor, c: Tensor) -> Tensor:
    shift, scale = F.linear(F.silu(c), *pair(m.adaLN_modulation[1])).chunk(2, dim=-1)
    return F.linear(F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale) + shift, *pair(m.linear))


def head(m: SimpleMLPAdaLN, x: Tensor, t: Tensor, c: Tensor, index: Tensor) -> Tensor:
    return reference.head_forward(dict(m.named_parameters()), x, t, c, index[:, 0])


def loss(
    m: DiffLoss,
    target: Tensor,
    z: Tensor,
    index: Tensor,
    mask: Tensor,
    loss_weight: Tensor,
    timestep: Tensor,
    noise: Tensor,
) -> Tensor:
    noised = reference.q_sample(target, noise, timestep, reference.make_schedule(1000))
    rows = reference.hybrid_loss(
        head(m.net, noised, timestep, z, index), target, noise, noised, timestep
    )
    return (rows * loss_weight * mask).sum() / mask.sum()


def block(m: Block, x: Tensor, key_mask: Tensor) -> Tensor:
    first = (*pair(m.norm1), *pair(m.attn.qkv), *pair(m.attn.proj))
    x = reference.layernorm_attention_residual(x, *first, key_mask, num_heads=2)
    return reference.layernorm_mlp_residual(x, *pair(m.norm2), *pair(m.mlp.fc1), *pair(m.mlp.fc2))


def low_pass(
    m: FilterMaskPatchify, latent: Tensor, level: Tensor, mask: Tensor, kept: Tensor
) -> Tensor:
    tokens = reference.filter_mask_patchify(latent, level, mask, patch_size=2, num_levels=6)
    return torch.stack([image[rows] for image, rows in zip(tokens, kept, strict=True)])


CASES: dict[str, Case] = {
    "ResBlock": (
        partial(ResBlock, WIDTH),
        lambda: {"x": normal(ROWS, WIDTH), "y": normal(ROWS, WIDTH)},
        res_block,
    ),
    "FinalLayer": (
        partial(FinalLayer, WIDTH, 4),
        lambda: {"x": normal(ROWS, WIDTH), "c": normal(ROWS, WIDTH)},
        final_layer,
    ),
    "SimpleMLPAdaLN": (
        partial(SimpleMLPAdaLN, TOKEN, WIDTH, 2 * TOKEN, CONDITION, 2),
        lambda: {
            "x": normal(ROWS, TOKEN),
            "t": TIMESTEP,
            "c": normal(ROWS, CONDITION),
            "index": LEVEL,
        },
        head,
    ),
    "DiffLoss": (
        partial(DiffLoss, TOKEN, CONDITION, 2, WIDTH, "4"),
        lambda: {
            "target": normal(ROWS, TOKEN),
            "z": normal(ROWS, CONDITION),
            "index": LEVEL,
            "mask": torch.tensor([1, 0, 1, 1, 0]),
            "loss_weight": 1 + normal(ROWS).abs(),
            "timestep": TIMESTEP,
            "noise": normal(ROWS, TOKEN),
        },
        loss,
    ),
    "Block": (
        partial(Block, WIDTH, 2, 3.0, qkv_bias=True, norm_layer=norm),
        lambda: {
            "x": normal(2, ROWS, WIDTH),
            "key_mask": torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]]).bool(),
        },
        block,
    ),
    "FilterMaskPatchify": (
        partial(FilterMaskPatchify, 2, 6),
        lambda: {
            "latent": normal(2, 2, 4, 4),
            "level": torch.tensor([2, 5]),
            "mask": torch.arange(8).view(2, 4) % 3 == 0,
            "kept": torch.tensor([[3, 1, 0], [2, 2, 1]]),
        },
        low_pass,
    ),
}
CONSTANT = ("target", "loss_weight", "noise")  # floating inputs that no gradient is wanted of


def build(
    name: str, dtype: torch.dtype, device: torch.device | str = "cpu", **options: Any
) -> tuple[nn.Module, Inputs]:
    """The module with weights by formula, and inputs that want gradients."""
    torch.manual_seed(0)
    make, inputs, _ = CASES[name]
    module = make(**options)
    fill_by_formula(module)

    def leaf(key: str, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x.to(device)
        return x.to(device, dtype).requires_grad_(key not in CONSTANT)

    return module.to(device, dtype), {key: leaf(key, x) for key, x in inputs().items()}


def leaves(module: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Everything that wants a gradient."""
    return [*(x for x in inputs.values() if x.requires_grad), *module.parameters()]


def value_and_gradients(
    function: Callable[..., Tensor], module: nn.Module, inputs: Inputs
) -> list[Tensor]:
    """Value, and the gradients of a fixed projection of it."""
    out = function(**inputs)
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    wanted = leaves(module, inputs)
    grads = torch.autograd.grad(out, wanted, cotangent)
    return [out.detach(), *grads]


def assert_right(
    name: str,
    dtype: torch.dtype,
    limit: float,
    device: torch.device | str = "cpu",
    **options: Any,
) -> None:
    """Value and gradients in `dtype` are within `limit` of the float64 reference."""
    module, inputs = build(name, dtype, device, **options)
    exact, doubled = build(name, torch.float64)
    truth = value_and_gradients(partial(CASES[name][2], exact), exact, doubled)
    ours = value_and_gradients(module, module, inputs)
    for i, (one, expected) in enumerate(zip(ours, truth, strict=True)):
        error = relative(one.cpu(), expected)
        assert error < limit, f"{name}, result {i}: error {error:.1e} ({dtype})"
