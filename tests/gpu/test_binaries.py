"""The kernels as the driver loads them: no spills, and the numbers of the compile proof."""

from __future__ import annotations

import pytest
import torch
from budget import ARCHS, NVIDIA, read_budget
from compiled import LAUNCHES, load_launches, make_job
from places import DTYPES

from fastfar import backend

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", DTYPES)
def test_loaded_kernels_do_not_spill(dtype: str) -> None:
    """Each launch of tests/triton/launches.py, compiled by the run-time for this GPU; not run."""
    import triton

    from fastfar.kernels.gpu._launch import recording

    arch = backend.architecture("cuda")
    name = next((name for name, number in ARCHS.items() if number == arch), None)
    budget = read_budget()
    committed = {(row.op, row.kernel, row.key): row for row in budget.rows if row.arch == name}
    same = name in NVIDIA and budget.triton == triton.__version__
    compared, wrong = 0, []
    for op, function in load_launches(LAUNCHES).items():
        with recording() as launches:
            function(arch, DTYPES[dtype])
        for launch in launches:
            options = {"enable_fp_fusion": True, **launch.options}
            kernel = launch.kernel.warmup(*launch.args, grid=launch.grid, **options)
            kernel._init_handles()
            if kernel.n_spills:
                wrong.append(f"{op}: {launch.name} {launch.options} spills {kernel.n_spills}")
            row = committed.get((op, launch.name, make_job(launch, name).key)) if same else None
            if row is not None:
                compared += 1
                assert (kernel.n_regs, kernel.metadata.shared) == (row.registers, row.shared), row
        del launches
        torch.cuda.empty_cache()
    assert not wrong, "\n".join(wrong)
    assert compared or not same, "the budget knows none of the launches"
