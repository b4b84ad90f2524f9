"""What backend.py reports and refuses, whatever the machine: variables are set per test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastfar import _native, backend
from fastfar.cli import main

VARIABLES = ("BACKEND", "ISA", "ATTENTION", "THREADS", "LOG", "REQUIRE_NATIVE")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(f"FASTFAR_{name}", raising=False)


def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "reason", lambda: _native.NOT_BUILT)


def test_backends_give_a_reason_or_none() -> None:
    state = backend.backends()
    assert tuple(state) == backend.BACKENDS == ("reference", "torch", "native", "triton")
    assert state["reference"] is None and state["torch"] is None
    assert state["native"] and state["triton"], "an off back end needs a reason"


def test_native_reason_tells_a_missing_library_from_a_library_without_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_native, "reason", lambda: None)
    assert "sampling kernels are not in it yet" in str(backend.backends()["native"])
    no_library(monkeypatch)
    assert "was not built" in str(backend.backends()["native"])


def test_auto_is_torch_unless_the_variable_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend.resolve("auto", "cpu") == "torch"
    monkeypatch.setenv("FASTFAR_BACKEND", "reference")
    assert backend.resolve("auto", "cpu") == "reference"
    assert backend.resolve("torch", "cpu") == "torch", "an argument beats the variable"
    monkeypatch.setenv("FASTFAR_BACKEND", "")
    assert backend.resolve() == "torch", "empty means not set"


@pytest.mark.parametrize("name", ["native", "triton"])
def test_explicit_request_that_is_off_is_an_error(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        backend,
        "backends",
        lambda: {"reference": None, "torch": None, "native": "why not", "triton": "why not"},
    )
    with pytest.raises(ValueError, match=f"backend='{name}' cannot be used: why not. Use auto"):
        backend.resolve(name, "cpu")
    monkeypatch.setenv("FASTFAR_BACKEND", name)
    with pytest.raises(ValueError, match=f"FASTFAR_BACKEND='{name}' cannot be used: why not"):
        backend.resolve("auto", "cpu")


def test_unknown_names_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="allowed: auto, reference, torch, native, triton"):
        backend.resolve("cuda", "cpu")
    with pytest.raises(ValueError, match="allowed: reference"):
        backend.best_dtype("numpy", "cpu")


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("FASTFAR_BACKEND", "fast", "auto, reference"),
        ("FASTFAR_ISA", "mmx", "auto, scalar"),
        ("FASTFAR_ATTENTION", "magic", "auto, sdpa"),
        ("FASTFAR_THREADS", "0", "auto, a whole number from 1"),
        ("FASTFAR_THREADS", "two", "auto, a whole number from 1"),
        ("FASTFAR_LOG", "3", "0, 1, 2"),
    ],
)
def test_a_wrong_variable_is_an_error_and_doctor_shows_it(
    name: str,
    value: str,
    allowed: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name}={value} is not known; allowed: {allowed}"):
        backend.resolve("auto", "cpu")
    assert main(["doctor", "--json"]) == 1
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert [each for each in settings if settings[each]["problem"]] == [name]


def test_attention_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend.attention() == "sdpa"
    for choice in ("flash", "xformers"):
        monkeypatch.setenv("FASTFAR_ATTENTION", choice)
        with pytest.raises(ValueError, match=f"FASTFAR_ATTENTION={choice} cannot be used: "):
            backend.resolve("torch", "cpu")


def test_an_instruction_set_without_the_library_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    no_library(monkeypatch)
    monkeypatch.setenv("FASTFAR_ISA", "avx2")
    with pytest.raises(ValueError, match=r"FASTFAR_ISA=avx2 cannot be served: .* not built"):
        backend.resolve("torch", "cpu")


def test_threads_and_log_are_applied() -> None:
    code = (
        "import torch; from fastfar import backend; backend.resolve('torch', 'cpu');"
        "backend.resolve('torch', 'cpu'); print(torch.get_num_threads())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).resolve().parents[1],
        env={"FASTFAR_THREADS": "1", "FASTFAR_LOG": "1", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == "1", done.stderr
    assert done.stderr.count("fastfar: back end torch on cpu (backend)") == 2


def test_a_cuda_device_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device 'cuda' cannot be used: no CUDA device"):
        backend.resolve("torch", "cuda")
    assert "no CUDA device" in str(backend.backends()["triton"])


def test_best_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend.best_dtype("reference", "cpu") == torch.float32
    sets: dict[str, str | None] = dict.fromkeys(backend.INSTRUCTION_SETS)
    monkeypatch.setattr(backend, "instruction_sets", lambda: sets)
    assert backend.best_dtype("torch", "cpu") == torch.bfloat16
    sets["amx"] = "refused"
    assert backend.best_dtype("torch", "cpu") == torch.bfloat16
    sets["avx512_bf16"] = "old"
    assert backend.best_dtype("torch", "cpu") == torch.float32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, dtype in {(9, 0): torch.bfloat16, (7, 5): torch.float32}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, c=capability: c)
        assert backend.best_dtype("torch", "cuda") == dtype


def test_instruction_sets_without_the_library_agree_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if _native.reason() is not None or not Path("/proc/cpuinfo").is_file():
        pytest.skip("needs the native library and /proc/cpuinfo")
    probed = {name: reason is None for name, reason in backend.instruction_sets().items()}
    no_library(monkeypatch)
    read = {name: reason is None for name, reason in backend.instruction_sets().items()}
    assert list(probed) == list(read)
    assert probed == read


def test_every_optional_package_is_usable_or_says_why() -> None:
    packages = backend.optional_packages()
    assert {"flash_attn", "xformers", "triton", "apex", "huggingface_hub", "nvtx"} <= set(packages)
    for name, reason in packages.items():
        assert reason is None or len(reason) > 10, name


def test_a_broken_or_foreign_package_is_off_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvtx.py").write_text("raise OSError('undefined symbol: nvtxRangePush')\n")
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")  # like PyPI's apex: not NVIDIA's
    for name in ("nvtx", "apex"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(backend, "_cuda_reason", lambda: None)
    backend._package_reason.cache_clear()
    try:
        assert "undefined symbol" in str(backend._package_reason("nvtx"))
        assert "not NVIDIA's apex" in str(backend._package_reason("apex"))
    finally:
        backend._package_reason.cache_clear()
        for name in ("nvtx", "apex"):
            sys.modules.pop(name, None)


def test_doctor_prints_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in ("torch", "demo model", "native library", "avx512_bf16", "triton", "FASTFAR_ISA"):
        assert word in text
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["backends"] == backend.backends()
    assert report["native"]["problem"] == _native.reason()
    assert {"fastfar", "python", "torch", "cpu", "cores", "threads", "memory_gib", "gpu"} <= set(
        report
    )
    assert bool(report["demo"]["path"]) != bool(report["demo"]["problem"])


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--help"])
    assert stop.value.code == 0
    assert "fastfar doctor --json" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_device_is_used() -> None:
    assert backend.resolve("auto", "cuda") == "torch"
    assert "CUDA" not in str(backend.backends()["triton"])
    assert backend.report()["gpu"]["devices"]
