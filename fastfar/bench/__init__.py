"""Benchmarks: whatever makes an image, and every op, measured by one protocol.

rows       what a line of a result file says: the contract of all that reads and writes them
timing     the one timing loop: in turns, the machine's peak right before and right after a sample
gate       right before fast: how far a result is from the truth, and how far it may be
subjects   FAR in each of its forms and the baselines in theirs, behind one protocol
run        gate, cold start, rounds, rows; resumes where it was interrupted

Installed, `fastfar.bench.cases` is `benchmarks/cases` of the repository. In a checkout that is not
installed the folder is found beside the package, as `fastfar.kernels` finds its own.
"""

from __future__ import annotations

from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parents[2] / "benchmarks"
if (_CHECKOUT / "cases" / "__init__.py").is_file() and (_CHECKOUT / "LOG.md").is_file():
    __path__.append(str(_CHECKOUT))
