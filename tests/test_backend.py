"""What backend.py reports and refuses, whatever the machine: variables are set per test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastfar import _native, _packages, backend
from fastfar.cli import main
from fastfar.cli._report import report

VARIABLES = ("BACKEND", "ISA", "ATTENTION", "THREADS", "LOG", "REQUIRE_NATIVE")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(f"FASTFAR_{name}", raising=False)


def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "reason", lambda: _native.NOT_BUILT)


def test_backends_give_a_reason_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "interpreting", lambda: False)
    monkeypatch.setattr(backend, "_cuda_reason", lambda: "no CUDA device")
    state = backend.backends()
    assert tuple(state) == backend.BACKENDS == ("reference", "torch", "native", "triton")
    assert state["reference"] is None and state["torch"] is None
    assert state["native"] == _native.reason()
    assert state["triton"], "an off back end needs a reason"


def test_native_is_off_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    no_library(monkeypatch)
    assert "was not built" in str(backend.backends()["native"])
    assert backend.resolve("auto", "cpu") == "torch"
    for ask in (lambda: backend.resolve("native"), lambda: backend.best_dtype("native", "cpu")):
        with pytest.raises(ValueError, match="was not built"):
            ask()


def test_auto_is_native_where_it_can_be_unless_the_variable_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_native, "reason", lambda: None)
    for dtype in (None, torch.float32, torch.bfloat16):
        assert backend.resolve("auto", "cpu", dtype) == "native"
    assert backend.resolve("auto", "cpu", torch.float64) == "torch"
    assert backend.resolve("auto", "cpu", torch.float16) == "torch"
    assert backend.resolve("auto", "cpu", native_reason="too narrow") == "torch"
    monkeypatch.setattr(backend, "_cuda_reason", lambda: None)
    for why_not, expected in ((None, "triton"), ("not installed", "torch")):
        monkeypatch.setattr(backend, "_package_reason", lambda _, reason=why_not: reason)
        assert backend.resolve("auto", "cuda") == expected
    assert backend.resolve("auto", "cuda", torch.float64) == "torch"
    monkeypatch.setenv("FASTFAR_BACKEND", "reference")
    assert backend.resolve("auto", "cpu") == "reference"
    assert backend.resolve("torch", "cpu") == "torch", "an argument beats the variable"
    monkeypatch.setenv("FASTFAR_BACKEND", "")
    assert backend.resolve() == "native", "empty means not set"


def test_triton_asked_for_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_cuda_reason", lambda: None)
    monkeypatch.setattr(backend, "_package_reason", lambda _: None)
    with pytest.raises(ValueError, match="float16 or bfloat16, not in"):
        backend.resolve("triton", "cuda", torch.float64)
    monkeypatch.setattr(backend, "interpreting", lambda: False)
    with pytest.raises(ValueError, match="runs on a GPU, the model is on cpu"):
        backend.resolve("triton", "cpu")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": torch.float64}, "float32 or bfloat16, not in torch.float64"),
        ({"dtype": torch.float16}, "float32 or bfloat16, not in torch.float16"),
        ({"native_reason": "too narrow"}, "too narrow"),
        ({"device": "meta"}, "runs on the CPU, the model is on meta"),
    ],
    ids=str,
)
def test_native_asked_for_where_it_cannot_be(
    options: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_native, "reason", lambda: None)
    with pytest.raises(ValueError, match=f"'native' cannot be used: .*{reason}.* Use auto, refer"):
        backend.resolve("native", **options)
    monkeypatch.setenv("FASTFAR_BACKEND", "native")
    with pytest.raises(ValueError, match=f"FASTFAR_BACKEND='native' cannot be used: .*{reason}"):
        backend.resolve("auto", **options)


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
    assert backend.attention() == "auto"
    for choice in ("flash_attn_2", "xformers"):
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
    monkeypatch.setattr(backend, "interpreting", lambda: False)
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


def test_best_dtype_of_the_native_back_end_is_that_of_the_selected_set(isa: str) -> None:
    wanted = torch.bfloat16 if isa in ("avx512_bf16", "amx") else torch.float32
    assert backend.best_dtype("native", "cpu") == wanted
    assert _native.load().selected == isa, "asking does not change the selection"


@pytest.mark.usefixtures("library")
def test_doctor_says_which_set_is_used_and_why() -> None:
    code = "from fastfar.cli import main; main(['doctor', '--json'])"
    environment = {"FASTFAR_ISA": "scalar", "FASTFAR_THREADS": "1", "PATH": ""}
    for settings, why in ((environment, "FASTFAR_ISA=scalar"), ({"PATH": ""}, "the fastest")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(__file__).resolve().parents[1],
            env=settings,
            capture_output=True,
            text=True,
            timeout=120,
        )
        found = json.loads(done.stdout)["native"]
        assert found["problem"] is None and why in found["why"], done.stderr
        if settings is environment:
            assert (found["isa"], found["dtype"], found["threads"]) == ("scalar", "float32", 1)


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
    monkeypatch.setattr(_packages, "cuda_reason", lambda: None)
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
    if _native.reason() is None:
        assert "runs on" in text and "threads" in text
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["backends"] == backend.backends()
    assert report["native"]["problem"] == _native.reason()
    plans = report["plans"]
    assert [name for name, plan in plans.items() if plan["approximate"]] == ["fast"]
    assert plans["fast"]["head_calls"] == 60 and plans["official-mask"]["head_calls"] == 1100
    assert "60 head calls per token, T = 6; approximate" in text
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
    pytest.importorskip("triton")
    assert backend.resolve("auto", "cuda") == "triton"
    assert "CUDA" not in str(backend.backends()["triton"])
    assert report()["gpu"]["devices"]
