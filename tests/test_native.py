"""The native library: every instruction set forced in turn, through the path that kernels use."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastfar import _native, backend

ROOT = Path(__file__).resolve().parents[1]
HEADER = ROOT / "kernels" / "cpu" / "fastfar_cpu.h"

needs_library = pytest.mark.skipif(
    _native.reason() is not None and os.environ.get("FASTFAR_REQUIRE_NATIVE") != "1",
    reason=f"native library: {_native.reason()}",
)

_FORCED = """
import json, torch
from fastfar import backend
torch.manual_seed(0)
a_MK, b_KN = torch.randn(19, 45), torch.randn(45, 35)
library = backend.native_library()
c_MN, isa = library.selftest(a_MK, b_KN)
exact_MN = a_MK.bfloat16().double() @ b_KN.bfloat16().double()
error = ((c_MN - exact_MN).norm() / exact_MN.norm()).item()
print(json.dumps({"ran": isa, "selected": library.selected, "error": error}))
"""


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter; a child, because the choice of a set is per process."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@needs_library
@pytest.mark.parametrize("isa", backend.INSTRUCTION_SETS)
def test_forced_instruction_set_runs_or_says_why(isa: str) -> None:
    reason = _native.load().instruction_sets()[isa]
    done = run_python(_FORCED, FASTFAR_ISA=isa)
    if reason is None:
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert result["ran"] == result["selected"] == isa, "did not dispatch to the forced set"
        assert result["error"] < 1e-6, result
    else:
        assert done.returncode != 0
        assert f"FASTFAR_ISA={isa}" in done.stderr and reason in done.stderr


@needs_library
def test_every_set_that_this_machine_reports_is_used() -> None:
    """Without this, a probe that says no to everything would make the test above pass."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        pytest.skip("no /proc/cpuinfo to compare with")
    flags = set(re.findall(r"\S+", cpuinfo.read_text(encoding="utf-8").split("\n\n", 1)[0]))
    sets = _native.load().instruction_sets()
    assert list(sets) == list(backend.INSTRUCTION_SETS)
    for isa, flag in {"avx2": "avx2", "avx512": "avx512bw", "avx512_bf16": "avx512_bf16"}.items():
        assert (sets[isa] is None) == (flag in flags), (isa, sets[isa])
    if "amx_bf16" not in flags:
        assert sets["amx"] is not None
    elif sets["amx"] is not None:  # a sandbox may refuse it, nothing else may
        assert "permission" in sets["amx"]


@needs_library
def test_auto_is_the_fastest_usable_set() -> None:
    usable = [isa for isa, reason in _native.load().instruction_sets().items() if reason is None]
    done = run_python(_FORCED, FASTFAR_ISA="auto")
    assert json.loads(done.stdout)["ran"] == usable[-1], done.stderr


def test_unknown_instruction_set_is_an_error() -> None:
    done = run_python("from fastfar import backend; backend.native_library()", FASTFAR_ISA="mmx")
    assert done.returncode != 0
    assert "FASTFAR_ISA=mmx is not known; allowed: auto, scalar, avx2" in done.stderr


@needs_library
def test_selftest_takes_strided_and_empty_input_and_refuses_the_rest() -> None:
    library = backend.native_library()
    a_MK = torch.arange(-15.0, 15.0).reshape(5, 6)
    b_KN = torch.arange(24.0).reshape(4, 6).T  # not contiguous
    c_MN, _ = library.selftest(a_MK, b_KN)
    torch.testing.assert_close(c_MN, a_MK @ b_KN, rtol=0, atol=0)
    assert library.selftest(torch.ones(3, 0), torch.ones(0, 2))[0].equal(torch.zeros(3, 2))
    assert library.selftest(torch.ones(0, 4), torch.ones(4, 2))[0].shape == (0, 2)
    with pytest.raises(TypeError, match="float32"):
        library.selftest(a_MK.double(), b_KN.double())
    with pytest.raises(ValueError, match=r"\(M, K\) and \(K, N\)"):
        library.selftest(a_MK, a_MK)


@needs_library
def test_unknown_name_does_not_change_the_selection() -> None:
    library = backend.native_library()
    before = library.selected
    with pytest.raises(ValueError, match="known: auto, scalar"):
        library.select("neon")
    assert library.selected == before


def exported() -> set[str]:
    """Names that the library must export, and no others."""
    operations = {f"fastfar_{op}" for op in _native._OPERATIONS}
    scratch = {f"fastfar_{op}_scratch" for op in _native._WITH_SCRATCH}
    return {*_native._SIGNATURES, *operations, *scratch}


def fields(body: str) -> list[str]:
    """The fields of a C structure in the notation of `_native._OPERATIONS`."""
    kinds = {"int32_t": "i", "int64_t": "q", "float": "f"}
    result = []
    for declaration in body.split(";")[:-1]:
        kind, names = declaration.replace("const ", "").strip().split(maxsplit=1)
        for name in names.split(","):
            pointer = "*" in kind + name
            result.append(name.strip(" *") + (":p" if pointer else f":{kinds[kind]}"))
    return result


def test_python_and_header_agree() -> None:
    header = HEADER.read_text(encoding="utf-8")
    version = re.search(r"#define FASTFAR_ABI_VERSION (\d+)", header)
    assert version is not None and int(version[1]) == _native.ABI_VERSION
    code = re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)
    assert set(re.findall(r"\b(fastfar_\w+)\(", code)) == exported()
    bodies = re.findall(r"typedef struct \{([^}]*)\} fastfar_(\w+)_args;", code)
    assert {op for _, op in bodies} == set(_native._OPERATIONS)
    for body, op in bodies:
        assert fields(body) == _native._OPERATIONS[op].split(), op
    names = re.findall(r"#define FASTFAR_ISA_(?!COUNT)(\w+) (\d+)", header)
    ordered = [name.lower() for name, _ in sorted(names, key=lambda pair: int(pair[1]))]
    assert ordered == list(backend.INSTRUCTION_SETS)


@needs_library
def test_only_the_interface_is_exported() -> None:
    nm = shutil.which("nm")
    if nm is None or sys.platform == "darwin":
        pytest.skip("needs GNU nm")
    listing = subprocess.run(
        [nm, "-D", "--defined-only", str(_native.library_path())],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert {line.split()[-1] for line in listing.splitlines()} == exported()


def test_missing_and_foreign_files_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="reinstall fastfar"):
        _native.NativeLibrary(tmp_path / "libfastfar_cpu.so")
    foreign = tmp_path / "foreign.so"
    foreign.write_bytes(b"not a library")
    with pytest.raises(OSError, match=r"foreign\.so"):
        _native.NativeLibrary(foreign)


def build_and_run(folder: Path, *options: str) -> str:
    """Builds library and C++ tests with these options and runs ctest; returns what it printed.

    With -Og: the compiler takes half the time of -O1, and what it makes runs as fast.
    """
    if shutil.which("cmake") is None or not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("needs CMake and a C++ compiler")

    def run(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    quick = ("-DFASTFAR_BUILD_TESTS=ON", "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-Og")
    run("cmake", "-S", str(ROOT), "-B", str(folder), *quick, *options)
    run("cmake", "--build", str(folder), "--parallel", "2")
    return run("ctest", "--test-dir", str(folder), "--verbose", "--no-tests=error")


@needs_library
def test_cpp_tests_pass(tmp_path: Path) -> None:
    """Of the installed library, on all instruction sets; torch-free."""
    output = build_and_run(tmp_path, f"-DFASTFAR_LIBRARY={_native.library_path()}")
    for isa, reason in backend.instruction_sets().items():
        assert reason is not None or f"ran {isa}" in output, output


def test_cpp_tests_pass_with_sanitizers(tmp_path: Path) -> None:
    """No access outside a buffer, no undefined behaviour; warnings are errors.

    Two sets are enough: those between compute as avx512_bf16 does, with vectors that are as long
    or half as long, and no sanitizer sees what amx's tile instructions read and write.
    """
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    flags = "-fsanitize=address,undefined"
    (tmp_path / "empty.cc").write_text("int main() { return 0; }\n")
    program = str(tmp_path / "empty")
    probe = subprocess.run([compiler, flags, "-o", program, f"{program}.cc"], capture_output=True)
    if probe.returncode != 0 or subprocess.run([program], capture_output=True).returncode != 0:
        pytest.skip(f"{compiler} {flags} gives no program that runs here")
    build_and_run(
        tmp_path / "build",
        "-DFASTFAR_SANITIZE=address,undefined",
        "-DFASTFAR_WERROR=ON",
        "-DFASTFAR_SETS=scalar;avx512_bf16",
    )
