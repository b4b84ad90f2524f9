"""The denoising MLP in the form that the native `denoise_loop` reads.

Matrices in the order in which a diffusion step uses them, each packed (w = width):

    cond_embed
    per block:    [shift' | scale'] in turns of 16 rows, gate, mlp.0, mlp.2
    final layer:  scale, [linear | linear shift] in turns of 32 rows, rows being [eps | v]

LayerNorm's affine (g, b) goes into the modulation: with xhat = LN without affine,

    (g xhat + b) (1 + scale) + shift = xhat scale' + shift'
    scale' = g (1 + scale),  shift' = shift + b (1 + scale)

and the final layer's shift, which nothing but its linear layer sees, goes through that layer
beforehand: W_f (xhat (1 + scale) + W_h y + b_h) = W_f (xhat (1 + scale)) + (W_f W_h) y + W_f b_h.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastfar.ops._head_weights import TIME_LAYERS, HeadWeights
from fastfar.packing import pack

TILE = 16  # rows of a turn of shifts and scales; eps and v start at multiples of it
PANEL = 32  # outputs of a panel, rows of the other turns


class PackedHead(HeadWeights):
    """Packed parameters of one denoising MLP: "weights", "vectors" and the time embedding's.

    Attributes:
        compute_dtype: float32 or bfloat16, of the products.
        width, depth, channels, condition_width: w, blocks, P and D.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        compute_dtype: torch.dtype,
        depth: int,
        channels: int,
        condition_width: int,
    ) -> None:
        super().__init__(tensors, compute_dtype, depth)
        self.channels = channels
        self.condition_width = condition_width


def pack_head(head: Mapping[str, Tensor], dtype: torch.dtype) -> PackedHead:
    """Pack the parameters of a denoising MLP (published names without `diffloss.net.`).

    Raises ValueError where its width is no multiple of 16.
    """

    def read(name: str) -> Tensor:
        return head[name].detach().to(torch.float32)

    depth = sum(name.endswith(".in_ln.weight") for name in head)
    width, channels = head["input_proj.weight"].shape
    if width % TILE:
        raise ValueError(
            f"the native back end takes heads whose width is a multiple of {TILE}, got {width}; "
            "use backend 'torch'"
        )
    condition = read("cond_embed.weight")
    weights: list[Tensor] = [pack(condition, dtype)]
    vectors = [
        _pad(read("cond_embed.bias") + read("index_cond_embed.bias")),
        _pad(read("index_cond_embed.weight")[:, 0]),
        _pad(read("input_proj.bias")),
        *(_pad(row) for row in read("input_proj.weight").T),
    ]
    for i in range(depth):
        name = f"res_blocks.{i}."
        gain, offset = read(name + "in_ln.weight"), read(name + "in_ln.bias")
        shift, scale, gate = read(name + "adaLN_modulation.1.weight").chunk(3)
        shift_bias, scale_bias, gate_bias = read(name + "adaLN_modulation.1.bias").chunk(3)
        folded_shift = shift + offset[:, None] * scale
        folded_shift_bias = shift_bias + offset * (1.0 + scale_bias)
        weights += [
            pack(_in_turns(folded_shift, gain[:, None] * scale, TILE), dtype),
            pack(gate, dtype),
            pack(read(name + "mlp.0.weight"), dtype),
            pack(read(name + "mlp.2.weight"), dtype),
        ]
        vectors += [
            _in_turns(folded_shift_bias, gain * (1.0 + scale_bias), TILE),
            _pad(gate_bias),
            _pad(read(name + "mlp.0.bias")),
            _pad(read(name + "mlp.2.bias")),
        ]
    shift, scale = read("final_layer.adaLN_modulation.1.weight").chunk(2)
    shift_bias, scale_bias = read("final_layer.adaLN_modulation.1.bias").chunk(2)
    output = _apart(read("final_layer.linear.weight"))
    output_bias = _apart(read("final_layer.linear.bias")) + output @ shift_bias
    weights += [pack(scale, dtype), pack(_in_turns(output, output @ shift, PANEL), dtype)]
    vectors += [_pad(1.0 + scale_bias), _pad(output_bias)]
    tensors = {"weights": torch.cat(weights), "vectors": torch.cat(vectors)}
    for name in TIME_LAYERS:
        tensors |= {f"{name}.{part}": read(f"{name}.{part}").clone() for part in ("weight", "bias")}
    return PackedHead(tensors, dtype, depth, channels, condition.shape[1])


def _pad(rows: Tensor, multiple: int = PANEL) -> Tensor:
    """Zero rows (or numbers) appended up to a multiple."""
    missing = -len(rows) % multiple
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])


def _in_turns(a: Tensor, b: Tensor, rows: int) -> Tensor:
    """`rows` rows of a, as many of b, the next ones of a ..."""
    a, b = _pad(a, rows), _pad(b, rows)
    pairs = [a.view(-1, rows, *a.shape[1:]), b.view(-1, rows, *b.shape[1:])]
    return torch.stack(pairs, dim=1).reshape(2 * len(a), *a.shape[1:])


def _apart(rows: Tensor) -> Tensor:
    """[eps | v], each zero-padded to a multiple of 16."""
    return torch.cat([_pad(part, TILE) for part in rows.chunk(2)])
