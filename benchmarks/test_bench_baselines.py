"""One image of VAR, MAR and LlamaGen in both forms, by pytest-benchmark.

    python -m pytest benchmarks/test_bench_baselines.py -k "var_d16 or llamagen_b"

Random weights. Of MAR's 256 steps a few are run, and the time is theirs: `fastfar bench` scales it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fastfar.baselines import FORMS, NAMES


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_baseline(timed_subject: Callable[[str], None], name: str, form: str) -> None:
    timed_subject(f"{name}/{form}")
