"""Does `compiled.specialise` what Triton's run-time does? A command: 0 if so.

The run-time gets a driver of a GPU that is not there, and real tensors. What it compiles for a
launch must be what `specialise` makes of the same launch on fake tensors, by Triton's own hash.
"""

from __future__ import annotations

import sys
import tempfile
from types import SimpleNamespace

import compiled
import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode

from fastfar.kernels.gpu._launch import launch, recording


@triton.jit
def kernel(a, b, c, d, n, m, k, one, far, scale, flag, TWICE: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    x = tl.load(a + index * m + far, mask=index < n, other=0.0) + tl.load(b + index * one)
    if c is not None:
        x += tl.load(c + index * k)
    if flag:
        x = x * scale
    tl.store(d + index, (2 * x if TWICE else x).to(d.dtype.element_ty))


def call(device: str) -> None:
    """Aligned and unaligned tensors; whole numbers of every kind; None, a flag, a float."""
    whole = torch.empty(4096, dtype=torch.bfloat16, device=device)
    part = torch.empty(4096, device=device).narrow(0, 1, 4000)
    shifted = torch.empty(4096, dtype=torch.float16, device=device).narrow(0, 8, 4000)
    options = {"TWICE": True, "BLOCK": 64, "num_warps": 2, "num_stages": 1}
    for c in (None, part):
        for far in (16, 2**31 + 16, 2**31 + 1):
            launch(kernel, (1,), whole, part, c, shifted, 48, 7, 0, 1, far, 0.5, True, **options)


def main() -> int:
    """Compare; 0 if all are equal."""
    target = compiled.target_of("sm_90")
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: target,
        )
    )
    with FakeTensorMode(), recording() as fake:
        call("cuda")
    with recording() as real:
        call("cpu")
    keys = set()
    for ours, theirs in zip(fake, real, strict=True):
        source, options = compiled.specialise(ours, target)
        made = triton.compile(source, target=target, options=options.__dict__)
        options = {"enable_fp_fusion": True, **theirs.options}
        run = theirs.kernel.warmup(*theirs.args, grid=theirs.grid, **options)
        assert run.hash == made.hash, (source.signature, source.attrs)
        keys.add(run.hash)
    assert len(keys) == 6, "each of these launches is a specialisation of its own"
    return 0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder
        sys.exit(main())
