"""Every back end of attention that this machine has, against the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from places import Place
from tolerances import assert_close_to_reference, relative
from torch import Tensor

from fastfar import backend, reference
from fastfar.ops import attention
from fastfar.ops._attention import REGISTRY, reason, request_of

SHAPES = {  # B, S, heads, E
    "FAR-B": (2, 320, 12, 64),
    "FAR-H": (2, 320, 16, 80),
    "odd": (3, 77, 5, 40),
    "tiny": (1, 5, 2, 8),
}


def draw(shape: str, place: Place) -> Tensor:
    batch, length, heads, width = SHAPES[shape]
    qkv = torch.randn(batch, length, 3, heads, width, device=place.device)
    return qkv.to(place.dtype)


def serve(
    name: str, qkv: Tensor, key_mask: Tensor | None = None, dropout: float = 0.0
) -> None:
    """Skip, with its reason, where back end `name` does not take the call."""
    request = replace(request_of(qkv, key_mask, dropout), needs_gradient=True)
    if (why_not := reason(name, request)) is not None:
        pytest.skip(f"{name}: {why_not}")


# On a CPU tests/test_attention_registry.py has the rest.
ON_GPU = [name for name in ("auto", *backend.ATTENTIONS) if name != "sdpa_math"]
each_backend = pytest.mark.parametrize(
    "name", ["sdpa_math", *(pytest.param(name, marks=pytest.mark.gpu) for name in ON_GPU)]
)
LARGE = [name for name in SHAPES if name != "odd"]
each_shape = pytest.mark.parametrize(
    "shape", ["odd", *(pytest.param(name, marks=pytest.mark.gpu) for name in LARGE)]
)


@each_backend
@each_shape
def test_values_and_gradients(name: str, shape: str, place: Place) -> None:
    qkv = draw(shape, place)
    if name != "auto":
        serve(name, qkv)
    assert_close_to_reference(
        lambda x: attention(x, implementation=name),
        reference.attention,
        qkv,
        dtype=place.dtype,
        layers=4,  # flash kernels round the weights once more
    )


@each_backend
def test_key_padding(name: str, place: Place) -> None:
    """Keys without a mask of True take no part, whatever they hold."""
    qkv = draw("odd", place)
    mask = torch.ones(qkv.shape[:2], dtype=torch.bool, device=place.device)
    mask[0, 50:] = mask[1, :3] = False
    if name != "auto":
        serve(name, qkv, mask)
    assert_close_to_reference(
        lambda x: attention(x, mask, implementation=name),
        lambda x: reference.attention(x, mask),
        qkv,
        dtype=place.dtype,
        layers=4,
    )
    changed = qkv.clone()
    changed[0, 50:, 1:] = 100.0
    ours, same = (attention(x, mask, implementation=name) for x in (qkv, changed))
    assert torch.equal(ours[0, :50], same[0, :50])


@each_backend
def test_dropout_keeps_the_mean(name: str, place: Place) -> None:
    qkv = draw("odd", place)
    if name != "auto":
        serve(name, qkv, dropout=0.25)
    truth = reference.attention(qkv.double())
    count = 400 if place.real else 30
    draws = torch.stack(
        [attention(qkv, dropout=0.25, implementation=name).double() for _ in range(count)]
    )
    assert float(draws.std(0).mean()) > 1e-3, "nothing was dropped"
    assert relative(draws.mean(0), truth) < 2.5 * relative(draws[0], truth) / count**0.5


@each_backend
def test_deterministic_gradients(
    name: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under PyTorch's switch gradients repeat bit by bit, or the back end says why it cannot."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or PyTorch refuses cuBLAS
    qkv = draw("odd", place).requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        if name != "auto":
            serve(name, qkv)
        grads = [
            torch.autograd.grad(attention(qkv, implementation=name).float().square().sum(), qkv)[0]
            for _ in range(3)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


@pytest.mark.gpu
@each_backend
def test_in_a_graph(name: str) -> None:
    """No synchronisation and no allocation that a capture forbids."""
    place = Place(torch.device("cuda"), torch.bfloat16)
    qkv = draw("FAR-H", place)
    with torch.no_grad():
        if name != "auto":
            serve(name, qkv)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            attention(qkv, implementation=name)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attention(qkv, implementation=name)
        for _ in range(2):
            qkv.normal_()
            graph.replay()
            assert torch.equal(out, attention(qkv, implementation=name))


def test_the_registry_is_what_is_tested() -> None:
    assert set(REGISTRY) == set(backend.ATTENTIONS)
