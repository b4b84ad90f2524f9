"""The denoising MLP in the form that the GPU's `denoise_loop` reads.

All modulations of a row are one product with silu(y), y the row's condition and time embedding.
What stands beside them is folded in beforehand (w = width, hats are normalised without affine):

    LN's affine (g, b):   (g xhat + b) (1 + scale) + shift = xhat scale' + shift'
                          scale' = g (1 + scale),  shift' = shift + b (1 + scale)
    a block's shift:      W_1 (xhat scale' + shift') + b_1 = W_1 (xhat scale') + r
                          r = W_1 shift' + b_1, linear in silu(y), is added in float32
    the final shift:      W_f (xhat (1 + scale) + shift) + b_f = W_f (xhat (1 + scale)) + r_f

Columns of the modulations: scale', r and gate (w each) per block, then 1 + scale (w) and r_f (2P).
That is (3 d + 1) w + 2P numbers a row, w - 2P fewer than as published, for the same function.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastfar.ops._head_weights import TIME_LAYERS, HeadWeights

# Read in the compute dtype, as are the biases that a product adds; everything else in float32.
_OPERANDS = ("cond_embed", "modulations", "input_proj", "final", "fc1", "fc2")
_ADDED = ("modulations", "fc2")


class FoldedHead(HeadWeights):
    """Folded parameters of one denoising MLP.

    Attributes:
        compute_dtype: float32, float16 or bfloat16, of the products.
        width, depth, channels: w, d and P.
    """

    def __init__(self, tensors: dict[str, Tensor], depth: int) -> None:
        super().__init__(tensors, tensors["modulations.weight"].dtype, depth)
        self.channels = tensors["input_proj.weight"].shape[1]


@torch.no_grad()
def fold_head(head: Mapping[str, Tensor], dtype: torch.dtype) -> FoldedHead:
    """Fold the parameters of a denoising MLP (published names without `diffloss.net.`).

    Folding is done in float64 on the head's device, then rounded to `dtype` once.
    """

    def read(name: str) -> Tensor:
        return head[name].detach().to(torch.float64)

    depth = sum(name.endswith(".in_ln.weight") for name in head)
    tensors: dict[str, Tensor] = {}
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    for i in range(depth):
        name = f"res_blocks.{i}."
        gain, offset = read(name + "in_ln.weight"), read(name + "in_ln.bias")
        shift, scale, gate = read(name + "adaLN_modulation.1.weight").chunk(3)
        shift_bias, scale_bias, gate_bias = read(name + "adaLN_modulation.1.bias").chunk(3)
        fc1, fc1_bias = read(name + "mlp.0.weight"), read(name + "mlp.0.bias")
        folded_shift = shift + offset.unsqueeze(1) * scale
        folded_bias = shift_bias + offset * (1.0 + scale_bias)
        weights += [gain.unsqueeze(1) * scale, fc1 @ folded_shift, gate]
        biases += [gain * (1.0 + scale_bias), fc1 @ folded_bias + fc1_bias, gate_bias]
        tensors[f"{i}.fc1.weight"] = fc1
        tensors[f"{i}.fc2.weight"] = read(name + "mlp.2.weight")
        tensors[f"{i}.fc2.bias"] = read(name + "mlp.2.bias")
    shift, scale = read("final_layer.adaLN_modulation.1.weight").chunk(2)
    shift_bias, scale_bias = read("final_layer.adaLN_modulation.1.bias").chunk(2)
    final, final_bias = read("final_layer.linear.weight"), read("final_layer.linear.bias")
    tensors |= {
        "modulations.weight": torch.cat([*weights, scale, final @ shift]),
        "modulations.bias": torch.cat([*biases, 1.0 + scale_bias, final @ shift_bias + final_bias]),
        "final.weight": final,
        "cond_embed.weight": read("cond_embed.weight"),
        "cond_embed.bias": read("cond_embed.bias") + read("index_cond_embed.bias"),
        "level.weight": read("index_cond_embed.weight").squeeze(1),
        "input_proj.weight": read("input_proj.weight"),
        "input_proj.bias": read("input_proj.bias"),
    }
    for name in TIME_LAYERS:
        tensors |= {f"{name}.{part}": read(f"{name}.{part}") for part in ("weight", "bias")}

    def rounded(name: str, x: Tensor) -> Tensor:
        layer, part = name.split(".")[-2:]
        operand = layer in (_OPERANDS if part == "weight" else _ADDED)
        return x.to(dtype if operand else torch.float32).contiguous()

    prepared = {name: rounded(name, x) for name, x in tensors.items()}
    prepared["input_proj.moments"] = projection_moments(
        prepared["input_proj.weight"], prepared["input_proj.bias"]
    )
    return FoldedHead(prepared, depth)


def projection_moments(weight_WP: Tensor, bias_W: Tensor) -> Tensor:
    """(P + 2, P + 1) float32: mean and variance over the columns of x W^T + b as a function of x.

    The first P + 1 rows are the covariance of the columns of (W, b), the last one is their mean:
    variance = (x, 1) K (x, 1)^T and mean = (x, 1) . m. In float64, from W as it is multiplied.
    """
    columns = torch.cat([weight_WP.double(), bias_W.double().unsqueeze(1)], dim=1)
    mean = columns.mean(0, keepdim=True)
    centred = columns - mean
    covariance = centred.t() @ centred / len(columns)
    return torch.cat([covariance, mean]).float().contiguous()
