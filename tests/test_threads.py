"""The native thread pool as a Python program meets it: its threads, its forks, its end.

How the pool hands out tasks is proven by tests/cpp/threads_test.cc.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastfar import _native
from fastfar.packing import pack

ROOT = Path(__file__).resolve().parents[1]
COUNTS = (1, 2, 3, 4)

pytestmark = pytest.mark.skipif(
    _native.reason() is not None and os.environ.get("FASTFAR_REQUIRE_NATIVE") != "1",
    reason=f"native library: {_native.reason()}",
)

# Operands whose product is exact, with work for four threads.
_OPERANDS = """
import os, sys, threading, time
import torch
from fastfar import _native
library = _native.load()
def operands(seed):
    generator = torch.Generator().manual_seed(seed)
    a_MK = torch.randint(-8, 9, (70, 65), generator=generator).float()
    return a_MK, torch.randint(-8, 9, (65, 400), generator=generator).float()
a_MK, b_KN = operands(0)
expected = (a_MK.double() @ b_KN.double()).float()
def right():
    return library.selftest(a_MK, b_KN)[0].equal(expected)
"""


def run_python(code: str, timeout: float = 60.0) -> str:
    """Standard output of `code` after _OPERANDS, in a fresh interpreter that must end well."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", _OPERANDS + code],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(autouse=True)
def threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    library = _native.load()
    a_MK, b_KN = torch.randn(70, 300), torch.randn(300, 500)
    for dtype in (torch.float32, torch.bfloat16):
        products: list[Tensor] = []
        packed: list[Tensor] = []
        for count in (*COUNTS, *COUNTS):
            torch.set_num_threads(count)
            products.append(library.selftest(a_MK, b_KN, dtype)[0])
            packed.append(torch.Tensor.clone(pack(b_KN, dtype)))
        assert all(torch.equal(each, products[0]) for each in products)
        assert all(torch.equal(each, packed[0]) for each in packed)


def test_python_threads_at_once() -> None:
    """One of them gets the pool, the others compute alone: all results are right."""
    library = _native.load()
    torch.set_num_threads(2)
    wrong: list[str] = []
    start = threading.Barrier(4)

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        a_MK = torch.randint(-8, 9, (40 + seed, 65), generator=generator).float()
        b_KN = torch.randint(-8, 9, (65, 400), generator=generator).float()
        expected = (a_MK.double() @ b_KN.double()).float()
        start.wait(timeout=60)
        for _ in range(50):
            if not library.selftest(a_MK, b_KN)[0].equal(expected):
                wrong.append(f"thread {seed}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive(), "a native call does not return"
    assert not wrong


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")
def test_only_the_threads_that_torch_is_set_to() -> None:
    counts = run_python("""
def threads():
    return len(os.listdir("/proc/self/task"))
first = threads()
print(0)
for count in (1, 3, 2, 4, 1):
    torch.set_num_threads(count)
    assert right()
    print(threads() - first)
""")
    assert counts.split() == ["0", "0", "2", "2", "3", "3"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_of_a_program_that_has_used_the_pool() -> None:
    """The child has no threads but its own and builds its pool anew; the parent keeps its own."""
    output = run_python("""
torch.set_num_threads(3)
assert right()
for _ in range(3):
    child = os.fork()
    if child == 0:
        fine = right() and right()
        grandchild = os.fork()
        if grandchild == 0:
            os._exit(0 if right() else 1)
        os._exit(0 if fine and os.waitpid(grandchild, 0)[1] == 0 else 1)
    assert right()
    assert os.waitpid(child, 0)[1] == 0
child = os.fork()
if child == 0:
    sys.exit(0 if right() else 1)
assert os.waitpid(child, 0)[1] == 0
assert right()
print("forked")
""")
    assert output.split() == ["forked"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_while_another_thread_is_at_work() -> None:
    output = run_python("""
torch.set_num_threads(2)
stop = threading.Event()
def work():
    while not stop.is_set():
        assert right()
thread = threading.Thread(target=work)
thread.start()
for _ in range(20):
    child = os.fork()
    if child == 0:
        os._exit(0 if right() else 1)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
thread.join()
print("forked")
""")
    assert output.split() == ["forked"]


@pytest.mark.parametrize("daemon", [False, True], ids=["idle pool", "pool at work"])
def test_the_interpreter_ends_at_once(daemon: bool) -> None:
    output = run_python(f"""
torch.set_num_threads(4)
assert right()
import ctypes
w_NK = torch.randn(2048, 1024)
packed = torch.empty(library.packed_bytes(torch.float32, *w_NK.shape), dtype=torch.uint8)
arguments = library._arguments("pack", dict(
    dtype=0, source_dtype=0, n=2048, k=1024, stride_n=1024, stride_k=1, w=w_NK, packed=packed,
    threads=4,
))
call, reference = library._c.fastfar_pack, ctypes.byref(arguments)
def work():  # nothing of PyTorch's: a daemon thread that ends in there aborts the interpreter
    while True:
        call(reference)
if {daemon}:
    threading.Thread(target=work, daemon=True).start()
    time.sleep(0.05)
print(time.monotonic())
""")
    assert time.monotonic() - float(output) < 10
