"""A training step as data: what it multiplies, what it moves, what it keeps for the backward.

Every quantity is a formula as text, a sum of products such as "2 a N D + 8 N", and the text is what
is computed, by `value`. `LETTERS` says what its letters are.

This is the code on a GPU with the Triton kernels, as `backend="auto"` trains there: bfloat16
autocast over float32 weights, fused attention, and an encoder that sees all positions (masked
tokens are no keys: counting the visible ones would stall the device; on a CPU it sees those alone).
tests/test_costs_training.py holds it against what PyTorch counts and what autograd keeps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from fastfar.config import FARConfig
from fastfar.head import TIME_FEATURES

Formulas = Mapping[str, str]

LETTERS = {
    "B": "images of a micro-batch on a GPU",
    "L": "tokens of an image",
    "S": "positions of the transformer: buffer and tokens",
    "N": "rows of the transformer, B S",
    "D": "width of the transformer",
    "F": "width of its hidden layers",
    "H": "attention heads",
    "M": "batch multiplier",
    "R": "rows of the head, M B L",
    "W": "width of the head",
    "P": "numbers of a token",
    "E": "features of a timestep",
    "a": "bytes of an operand of a product (bfloat16)",
    "r": "bytes of a number of the residual streams",
    "m": "1 where there is dropout, whose masks take a byte for a number",
}


def value(formula: str, sizes: Mapping[str, float]) -> float:
    """A sum of products: "2 a N D + 8 N". An unknown letter is a KeyError."""
    return sum(
        math.prod(sizes[word] if word.isalpha() else float(word) for word in term.split())
        for term in formula.split("+")
    )


@dataclass(frozen=True)
class Linear:
    """A linear layer: (rows, inputs) times (inputs, outputs), as formulas.

    trained_input: its input wants a gradient, too.
    """

    rows: str
    outputs: str
    inputs: str
    trained_input: bool = True

    def products(self, sizes: Mapping[str, float]) -> tuple[list[Product], list[Product]]:
        """(m, n, k) of the forward, and of the backward: of the weight, then of the input."""
        m, n, k = (round(value(x, sizes)) for x in (self.rows, self.outputs, self.inputs))
        backward = [(n, k, m), (m, k, n)] if self.trained_input else [(n, k, m)]
        return [(m, n, k)], backward


Product = tuple[int, int, int]


@dataclass(frozen=True)
class Part:
    """Equal modules of the model, one after the other.

    Attributes:
        name: of them.
        count: how many.
        linears: by name.
        attention: whether there is one over S positions in H heads.
        kept: bytes that autograd keeps for the backward.
        forward, backward: bytes that kernels without products move; an entry is a kernel.
        input: what is kept instead where blocks are computed again; None: they never are.
        workspace: bytes of gradients that the backward holds at once.
    """

    name: str
    count: int
    linears: Mapping[str, Linear] = field(default_factory=dict)
    attention: bool = False
    kept: Formulas = field(default_factory=dict)
    forward: Formulas = field(default_factory=dict)
    backward: Formulas = field(default_factory=dict)
    input: str | None = None
    workspace: str = "0"


# The block of encoder and decoder: fastfar/ops/transformer_block.py on Triton.
_LINEARS = {
    "qkv": Linear("N", "3 D", "D"),
    "proj": Linear("N", "D", "D"),
    "fc1": Linear("N", "F", "D"),
    "fc2": Linear("N", "D", "F"),
}
_BLOCK_KEPT = {
    "stream before attention": "r N D",
    "its LayerNorm, input of qkv": "a N D",
    "queries, keys, values": "3 a N D",
    "result of attention, input of proj": "a N D",
    "log-sum-exp of the scores": "4 N H",
    "stream before the MLP": "r N D",
    "its LayerNorm, input of fc1": "a N D",
    "hidden layer before GELU": "a N F",
    "hidden layer after it, input of fc2": "a N F",
    "dropout masks": "2 m N D + m N F",
}
_BLOCK_FORWARD = {
    "LayerNorm": "r N D + a N D",
    "dropout of proj": "2 m a N D + m N D",
    "residual, LayerNorm": "2 r N D + 2 a N D",
    "GELU": "2 a N F",
    "dropout of the hidden layer": "2 m a N F + m N F",
    "dropout of fc2": "2 m a N D + m N D",
    "cast": "a N D + r N D",
    "residual": "3 r N D",
}
_BLOCK_BACKWARD = {
    "cast of the gradient": "r N D + a N D",
    "dropout of fc2": "2 m a N D + m N D",
    "bias of fc2": "a N D",
    "dropout of the hidden layer": "2 m a N F + m N F",
    "GELU": "3 a N F",
    "bias of fc1": "a N F",
    "residual, LayerNorm": "3 r N D + 2 a N D",
    "dropout of proj": "2 m a N D + m N D",
    "bias of proj": "a N D",
    "queries, keys, values side by side": "6 a N D",
    "bias of qkv": "3 a N D",
    "LayerNorm": "2 r N D + a N D",
    "sum of both gradients of the stream": "3 r N D",
}

# A block of the head: fastfar/ops/adaln_mlp_block.py on Triton.
_HEAD_LINEARS = {
    "adaLN_modulation": Linear("R", "3 W", "W"),
    "mlp.0": Linear("R", "W", "W"),
    "mlp.2": Linear("R", "W", "W"),
}
_HEAD_BLOCK_KEPT = {
    "stream": "r R W",
    "shift, scale, gate": "3 a R W",
    "after the first layer": "a R W",
    "after the second layer": "a R W",
}
_HEAD_BLOCK_FORWARD = {
    "LayerNorm, modulation": "r R W + 3 a R W",
    "SiLU": "2 a R W",
    "gate, residual": "2 r R W + 2 a R W",
}
_HEAD_BLOCK_BACKWARD = {
    "gate": "r R W + 4 a R W",
    "SiLU": "4 a R W",
    "LayerNorm, modulation": "3 r R W + 6 a R W",
    "modulations side by side": "6 a R W",
    "their bias": "3 a R W",
    "sum of gradients of the condition": "3 a R W",
}


# fmt: off
def parts(config: FARConfig) -> tuple[Part, ...]:
    """The training step of a model of these sizes; blocks of encoder and decoder are equal."""
    block = {
        "linears": _LINEARS,
        "attention": True,
        "kept": _BLOCK_KEPT,
        "forward": _BLOCK_FORWARD,
        "backward": _BLOCK_BACKWARD,
        "input": "r N D",
        "workspace": "r N D + 2 a N F",
    }
    head_block = {
        "linears": _HEAD_LINEARS,
        "kept": _HEAD_BLOCK_KEPT,
        "forward": _HEAD_BLOCK_FORWARD,
        "backward": _HEAD_BLOCK_BACKWARD,
        "input": "r R W",
        "workspace": "2 r R W + 11 a R W",
    }
    depth = config.encoder_depth + config.decoder_depth
    return (
        Part(
            "tokens to width",
            1,
            {"z_proj": Linear("B L", "D", "P", trained_input=False)},
            kept={
                "tokens, input of z_proj": "a B L P",
                "positions added": "4 N D",
                "statistics of LayerNorm": "8 N",
            },
            forward={"buffer in front": "2 a N D", "positions": "a N D + 4 N D",
                     "LayerNorm": "8 N D"},
            backward={"LayerNorm": "12 N D", "positions": "4 N D", "cast": "4 N D + a N D",
                      "bias": "a N D"},
        ),
        Part("transformer blocks", depth, **block),  # type: ignore[arg-type]
        Part(
            "encoder to decoder",
            1,
            {"decoder_embed": Linear("N", "D", "D")},
            kept={
                "stream": "4 N D",
                "statistics of LayerNorm": "8 N",
                "its result, input of decoder_embed": "a N D",
            },
            forward={"LayerNorm": "8 N D", "cast": "4 N D + a N D", "mask tokens": "2 a N D",
                     "buffer in front": "2 a N D", "positions": "a N D + 4 N D"},
            backward={"positions": "4 N D", "cast": "4 N D + a N D", "mask tokens": "6 a N D",
                      "bias": "a N D", "cast of LayerNorm": "a N D + 4 N D",
                      "LayerNorm": "12 N D"},
        ),
        Part(
            "decoder to head",
            1,
            kept={"stream": "4 N D", "statistics of LayerNorm": "8 N"},
            forward={"LayerNorm": "8 N D", "positions": "8 B L D"},
            backward={"positions": "4 B L D", "LayerNorm": "12 N D"},
        ),
        Part(
            "head: conditions",
            1,
            {
                "time_embed.0": Linear("R", "W", "E", trained_input=False),
                "time_embed.2": Linear("R", "W", "W"),
                "cond_embed": Linear("R", "W", "D"),
                "index_cond_embed": Linear("R", "W", "1", trained_input=False),
                "input_proj": Linear("R", "W", "P", trained_input=False),
            },
            kept={
                "time features": "a R E",
                "time layer before and after SiLU": "2 a R W",
                "condition of every row": "a R D",
                "levels": "a R",
                "their sum before and after SiLU": "2 a R W",
                "noised tokens": "a R P",
            },
            forward={"sines, cosines": "20 R E", "cast of them": "4 R E + a R E",
                     "SiLU of time": "2 a R W", "condition repeated": "8 R D",
                     "cast": "4 R D + a R D", "sum": "3 a R W", "sum with the level": "3 a R W",
                     "SiLU": "2 a R W"},
            backward={"SiLU": "3 a R W", "biases": "5 a R W", "SiLU of time": "3 a R W",
                      "cast": "a R D + 4 R D", "sum over the repetitions": "4 R D + 4 B L D"},
            workspace="4 R D + 2 a R W",
        ),
        # The first block turns its input, a product, into the stream.
        Part("head: first block", 1, **{**head_block, "input": "a R W"}),  # type: ignore[arg-type]
        Part("head: other blocks", config.head_depth - 1, **head_block),  # type: ignore[arg-type]
        Part(
            "head: output and loss",
            1,
            {
                "final_layer.adaLN_modulation": Linear("R", "2 W", "W"),
                "final_layer.linear": Linear("R", "2 P", "W"),
            },
            kept={
                "stream": "4 R W",
                "statistics of LayerNorm": "8 R",
                "1 + scale": "a R W",
                "LayerNorm": "4 R W",
                "modulated, input of the last layer": "a R W",
                "output": "2 a R P",
                "noise and noised tokens": "8 R P",
                "targets": "4 B L P",
                "timesteps": "8 R",
            },
            forward={"noised tokens": "8 R P", "LayerNorm": "8 R W", "1 + scale": "2 a R W",
                     "times scale": "8 R W + a R W", "plus shift": "8 R W + a R W",
                     "cast": "4 R W + a R W", "loss": "2 a R P + 8 R P + 4 R"},
            backward={"loss": "4 a R P + 8 R P", "bias": "2 a R P", "cast": "a R W + 4 R W",
                      "shift": "4 R W + a R W", "scale": "12 R W", "its cast": "4 R W + a R W",
                      "stream": "8 R W + a R W", "LayerNorm": "12 R W",
                      "modulations side by side": "4 a R W", "their bias": "2 a R W",
                      "sum of gradients of the condition": "3 a R W"},
            workspace="12 R W + 4 a R W",
        ),
    )

# fmt: on


def sizes_of(config: FARConfig, images: int, multiplier: int) -> dict[str, float]:
    """The letters of the formulas for a micro-batch of so many images."""
    positions = config.buffer_size + config.num_tokens
    return {
        "B": images,
        "L": config.num_tokens,
        "S": positions,
        "N": images * positions,
        "D": config.width,
        "F": int(config.width * config.mlp_ratio),
        "H": config.num_heads,
        "M": multiplier,
        "R": multiplier * images * config.num_tokens,
        "W": config.head_width,
        "P": config.token_dim,
        "E": TIME_FEATURES,
        "a": 2,
        "r": 4,
        "m": 1 if config.dropout > 0 else 0,
    }


def attention_flops(sizes: Mapping[str, float]) -> tuple[float, float]:
    """Forward, and backward as fused kernels do it: five products, the scores among them again."""
    return value("4 N S D", sizes), value("10 N S D", sizes)


def linear_flops(part: Part, sizes: Mapping[str, float]) -> tuple[float, float]:
    """Forward and backward of one of the part's modules, 2 per multiply-add, nothing padded."""
    forward = backward = 0.0
    for layer in part.linears.values():
        ahead, back = layer.products(sizes)
        forward += sum(2.0 * math.prod(each) for each in ahead)
        backward += sum(2.0 * math.prod(each) for each in back)
    return forward, backward


def flops(config: FARConfig, images: int, multiplier: int) -> tuple[float, float]:
    """Products of the forward and of the backward of one micro-batch, nothing padded or redone."""
    sizes = sizes_of(config, images, multiplier)
    forward = backward = 0.0
    for part in parts(config):
        ahead, back = linear_flops(part, sizes)
        if part.attention:
            attended = attention_flops(sizes)
            ahead, back = ahead + attended[0], back + attended[1]
        forward, backward = forward + part.count * ahead, backward + part.count * back
    return forward, backward


def kept_bytes(part: Part, sizes: Mapping[str, float], again: bool = False) -> float:
    """What autograd keeps of all modules of a part; again: of those that compute theirs again."""
    if again and part.input is not None:
        return part.count * value(part.input, sizes)
    return part.count * sum(value(formula, sizes) for formula in part.kept.values())


def activation_bytes(
    config: FARConfig, images: int, multiplier: int, grad_checkpointing: bool = False
) -> float:
    """What autograd keeps of one micro-batch, the copies of the weights left out."""
    sizes = sizes_of(config, images, multiplier)
    return sum(kept_bytes(part, sizes, grad_checkpointing) for part in parts(config))
