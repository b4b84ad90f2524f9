"""torch.compile(fullgraph=True) of the model and of a training step equals eager.

Mostly through "aot_eager": the graph with its backward, run by PyTorch's own kernels. One test goes
through the CPU inductor, which keeps a C++ compiler busy for most of a minute.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from formula import fill_by_formula
from tolerances import relative
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastfar import FAR, FARConfig, TrainingDraws, diffusion_loss
from fastfar.training.loss import sample_draws


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def model(tiny_config: FARConfig) -> FAR:
    """One block each: every one more is another second of tracing."""
    config = dataclasses.replace(
        tiny_config, encoder_depth=1, decoder_depth=1, head_depth=1, dropout=0.0
    )
    model = FAR(config).eval()
    fill_by_formula(model)
    return model


def inputs(model: FAR) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, class embeddings, and a mask of 2 tokens in one image and 5 in the other."""
    tokens = torch.randn(2, 9, 8)
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, 2:4], mask[1, 4:] = True, True
    return tokens, model.class_embedding(torch.tensor([1, 2])).detach(), mask


def batch(model: FAR, seed: int) -> tuple[Tensor, Tensor, TrainingDraws]:
    generator = torch.Generator().manual_seed(seed)
    draws = sample_draws(
        model.config, 2, batch_multiplier=2, label_dropout=0.5, generator=generator
    )
    return torch.randn(2, 2, 6, 6, generator=generator), torch.tensor([1, 2]), draws


def assert_same_step(model: FAR, compiled: Callable[..., Tensor], seed: int) -> None:
    """Loss and gradients of a training step, compiled and not."""
    results = []
    for loss in (diffusion_loss, compiled):
        value = loss(model, *batch(model, seed), level_weight="sine")
        grads: tuple[Any, ...] = torch.autograd.grad(
            value, list(model.parameters()), allow_unused=True
        )
        results.append((value, *grads))
    for one, other in zip(*results, strict=True):
        assert (one is None) == (other is None)
        if one is not None and one.norm() > 1e-4:
            assert relative(other, one) < 2e-5


@pytest.mark.parametrize("kind", ["no mask", "mask", "number of tokens known"])
@torch.no_grad()
def test_the_model_is_one_graph(model: FAR, kind: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    tokens, class_BD, mask = inputs(model)
    arguments: list[tuple[Any, ...]]
    if kind == "no mask":
        arguments = [(), ()]
    elif kind == "mask":  # other numbers of visible tokens are the same graph
        arguments = [(mask,), (mask.flip(1),), (torch.zeros_like(mask),)]
    else:
        arguments = [(mask[:1].expand(2, -1), 7), (mask[:1].flip(1).expand(2, -1), 7)]
    for more in arguments:
        expected = model(tokens, class_BD, *more)
        assert relative(compiled(tokens, class_BD, *more), expected) < 1e-5
    assert counter.frame_count == 1


@torch.no_grad()
def test_masked_tokens_are_not_looked_at(model: FAR) -> None:
    tokens, class_BD, mask = inputs(model)
    expected = model(tokens, class_BD, mask)
    tokens[mask] = float("nan")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert relative(compiled(tokens, class_BD, mask), expected) < 1e-5


def test_a_training_step_is_one_graph(model: FAR) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(diffusion_loss, fullgraph=True, backend=counter)
    for seed in (0, 1):  # other levels, masks, timesteps
        assert_same_step(model.train(), compiled, seed)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_inductor(model: FAR) -> None:
    """A training step through C++, model, mask and backward included.

    The options spare the C++ compiler: one source per graph, loops without vectors, no optimiser.
    """
    options = {
        "cpp_wrapper": True,
        "cpp.simdlen": 1,
        "aot_inductor.debug_compile": True,
        "compile_threads": 1,
    }
    compiled = torch.compile(diffusion_loss, fullgraph=True, options=options)
    assert_same_step(model.train(), compiled, 0)
