"""Which back end of attention serves a call: the one asked for, or by "auto" PyTorch's choice.

"auto" is "sdpa": it needs no package, can be captured and takes every request; at FAR's 320
positions it picks its flash kernel for half precision, and nothing faster is known. (Holding it to
"sdpa_flash" would set flags of the whole process, which other threads see.)

What is asked for and cannot be served is a ValueError that says why; it is never replaced by
another in silence. What "auto" takes is logged once (FASTFAR_LOG=1).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from fastfar import backend
from fastfar.ops._attention_backends import BACKENDS, AttentionBackend, AttentionRequest

REGISTRY = {each.name: each for each in BACKENDS}
_log = logging.getLogger("fastfar")

Function = TypeVar("Function", bound=Callable[..., Any])


def _constant(function: Function) -> Function:
    """A compiler calls it once, while it traces, and keeps the result.

    The mark of torch.compiler.assume_constant_result, which would import the compiler here: that
    takes longer than everything else that `import fastfar` does.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def asked_for(implementation: str) -> tuple[str, str]:
    """The name that is asked for, "auto" if none, and where.

    An argument other than "auto" beats FASTFAR_ATTENTION. Raises ValueError for an unknown name.
    """
    if implementation == "auto":
        return backend.attention(), "FASTFAR_ATTENTION"
    backend.attention_reason(implementation)  # raises for an unknown name
    return implementation, "attention"


@_constant
def _architecture(device: torch.device) -> int:
    return backend.architecture(device)


@_constant
def _missing(name: str) -> str | None:
    """Why the package of a back end cannot be used here; None if it can or there is none."""
    return backend.attention_reason(name)


@_constant
def _refuse(message: str) -> NoReturn:
    """A compiler shows what is raised in here, and hides what it raises while it traces."""
    raise ValueError(message)


def request_of(qkv_BS3HE: Tensor, key_mask_BS: Tensor | None, dropout: float) -> AttentionRequest:
    """What is asked for with these arguments of `fastfar.ops.attention`."""
    batch, length, _, heads, width = qkv_BS3HE.shape
    return AttentionRequest(
        batch=batch,
        queries=length,
        keys=length,
        heads=heads,
        head_dim=width,
        dtype=qkv_BS3HE.dtype,
        device=qkv_BS3HE.device.type,
        architecture=_architecture(qkv_BS3HE.device),
        dropout=dropout,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        key_padding=key_mask_BS is not None,
        needs_gradient=torch.is_grad_enabled() and qkv_BS3HE.requires_grad,
    )


def reason(name: str, request: AttentionRequest) -> str | None:
    """Why back end `name` cannot serve a request on this machine; None if it can."""
    return REGISTRY[name].supports(request) or _missing(name)


def choose(
    name: str, source: str, request: AttentionRequest
) -> tuple[AttentionBackend, str]:
    """The back end that serves a request, and why that one.

    Args:
        name: "auto" or a name of `REGISTRY`.
        source: who asks for it, for the message.

    Raises:
        ValueError: the one asked for cannot serve the request.
    """
    if name != "auto":
        why_not = reason(name, request)
        if why_not is None:
            return REGISTRY[name], source
        usable = ", ".join(each for each in REGISTRY if reason(each, request) is None)
        _refuse(f"{source}={name!r} cannot be used: {why_not}. For this call: auto, {usable}")
    return REGISTRY["sdpa"], "auto"


@functools.lru_cache(maxsize=1024)
def _chosen(name: str, source: str, request: AttentionRequest) -> AttentionBackend:
    chosen, why = choose(name, source, request)
    _announce(chosen.name, request.device, why)
    return chosen


@functools.cache
def _announce(name: str, device: str, why: str) -> None:
    """Once for each choice, not for each shape."""
    _log.info("attention %s on %s (%s)", name, device, why)


def run(
    qkv_BS3HE: Tensor, key_mask_BS: Tensor | None, dropout: float, implementation: str
) -> Tensor:
    """`fastfar.ops.attention` through the registry."""
    name, source = asked_for(implementation)
    request = request_of(qkv_BS3HE, key_mask_BS, dropout)
    if torch.compiler.is_compiling():  # sizes may be symbols, which no cache can hold
        chosen = choose(name, source, request)[0]
    else:
        chosen = _chosen(name, source, request)
    return chosen.run(qkv_BS3HE, key_mask_BS, dropout, request.deterministic)


def report(device: str) -> dict[str, Any]:
    """What `fastfar doctor` shows: each back end usable for FAR-H's sampling or the reason, and
    what "auto" takes for sampling and for training.

    device: "cuda" or "cpu".
    """
    sampling = AttentionRequest(
        batch=2,  # one image, with and without its class
        queries=320,
        keys=320,
        heads=16,
        head_dim=80,
        dtype=backend.best_dtype("torch", device),
        device=device,
        architecture=backend.architecture(device),
        dropout=0.0,
        deterministic=False,
        key_padding=False,
        needs_gradient=False,
    )
    training = {**vars(sampling), "dropout": 0.1, "needs_gradient": True}
    auto = {}
    for use, request in {"sampling": sampling, "training": AttentionRequest(**training)}.items():
        chosen, why = choose("auto", "", request)
        auto[use] = {"name": chosen.name, "why": why}
    return {"backends": {name: reason(name, sampling) for name in REGISTRY}, "auto": auto}
