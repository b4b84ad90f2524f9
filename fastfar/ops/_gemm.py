"""The matrix product of kernels/gpu/_gemm.py as a custom op."""

from __future__ import annotations

from torch import Tensor

from fastfar.ops._triton import architecture, kernel_op, kernels


@kernel_op("gemm", mutates=("out_MN", "copy_MN", "out_statistics"))
def gemm(
    a_MK: Tensor,
    w_NK: Tensor,
    out_MN: Tensor,
    kind: str = "linear",
    bias_N: Tensor | None = None,
    statistics: Tensor | None = None,
    statistics_tile: int = 1,
    scale_MK: Tensor | None = None,
    addend_MN: Tensor | None = None,
    activation: str = "none",
    gate_MN: Tensor | None = None,
    residual_MN: Tensor | None = None,
    copy_MN: Tensor | None = None,
    out_statistics: Tensor | None = None,
    eps: float = 1e-6,
) -> None:
    """out = residual + gate * f(operand W^T + bias + addend); see `kernels/gpu/_gemm.py`.

    The operand is a, or, given `statistics` of its rows, rstd (a - mean) * scale.
    """
    kernels("_gemm").gemm(
        a_MK,
        w_NK,
        out_MN,
        arch=architecture(out_MN),
        kind=kind,
        bias_N=bias_N,
        statistics=statistics,
        statistics_tile=statistics_tile,
        scale_MK=scale_MK,
        addend_MN=addend_MN,
        activation=activation,
        gate_MN=gate_MN,
        residual_MN=residual_MN,
        copy_MN=copy_MN,
        out_statistics=out_statistics,
        eps=eps,
    )
