"""profiling.py: names of the ranges, what they cost when off, and the Chrome trace."""

from __future__ import annotations

import json
import sys
import threading
import tracemalloc
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import FrameType

import pytest
import torch
from command import Captured, fails
from tiny_run import tiny_pipeline

from fastfar import FAR, SamplingPlan, backend, cli, diffusion_loss, sample_latents
from fastfar.profiling import annotate, ranges, trace

PLAN = SamplingPlan.official("mask", diffusion_steps=1).with_changes(
    levels=(0, 12), input_levels=(None, 12), guidance_ramp=(0.0, 0.5), temperatures=(1.0, 1.0),
    diffusion_steps=(1, 2), mask_ratios=(1.0, 0.5), x0_range=(-2.0, 2.0),
)  # fmt: skip


class Listener:
    """Stands for NVTX: the ranges as they are opened, indented by depth."""

    def __init__(self) -> None:
        self.depth = 0
        self.seen: list[str] = []

    def push(self, name: str) -> None:
        self.seen.append("  " * self.depth + name)
        self.depth += 1

    def pop(self) -> None:
        self.depth -= 1


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Listener:
    heard = Listener()
    monkeypatch.setattr(backend, "nvtx", lambda: (heard.push, heard.pop))
    return heard


def sample(model: FAR) -> None:
    sample_latents(model, [1], PLAN, generator=0, backend="torch", dtype=torch.float32)


def names(path: Path) -> set[str]:
    return {event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]}


def test_ranges_of_a_sampling_run(tiny_model: FAR, listener: Listener) -> None:
    sample(tiny_model)
    assert not listener.seen, "off by default"
    with ranges():
        sample(tiny_model)
    assert listener.depth == 0
    assert [line.rstrip() for line in listener.seen] == [
        "outer step 0",
        "  encoder",
        "  decoder",
        "  level 0",
        "    head",
        "outer step 1",
        "  encoder",
        "  decoder",
        "  level 12",
        "    head",
    ]
    listener.seen.clear()
    sample(tiny_model)
    assert not listener.seen, "off again"


def test_ranges_of_decoding_and_training(tiny_model: FAR, listener: Listener) -> None:
    pipe = tiny_pipeline()
    with ranges():
        pipe.decode(torch.zeros(1, 1, 8, 8), "pt", backend="torch")
        diffusion_loss(tiny_model, torch.zeros(1, 2, 6, 6), torch.tensor([1]))
    assert listener.seen == ["decode", "encoder", "decoder", "head"]


def test_a_range_is_closed_by_an_error(listener: Listener) -> None:
    with pytest.raises(KeyError), ranges(), annotate("level", 3):
        raise KeyError
    assert listener.seen == ["level 3"] and listener.depth == 0
    with annotate("level", 4):
        assert len(listener.seen) == 1


def test_ranges_that_overlap_in_threads(listener: Listener) -> None:
    """The last one that leaves turns them off."""
    entered, leave = threading.Event(), threading.Event()

    def work() -> None:
        with ranges():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=work)
    with ranges():
        thread.start()
        entered.wait(10)
    with annotate("a"):
        pass
    leave.set()
    thread.join()
    with annotate("b"):
        pass
    assert listener.seen == ["a"]


def calls(body: Callable[[], None]) -> list[str]:
    """What `body` calls, in order: a count, unlike a time, does not depend on who else is busy."""
    seen: list[str] = []

    def hear(frame: FrameType, event: str, argument: object) -> None:
        if event in ("call", "c_call"):
            seen.append(frame.f_code.co_name if event == "call" else repr(argument))

    sys.setprofile(hear)
    try:
        body()
    finally:
        sys.setprofile(None)
    return seen[1:-1]  # without `body` itself and the last setprofile


def test_off_costs_nothing() -> None:
    """Two looks and an empty context: no name is formatted, no memory is taken."""

    def body() -> None:
        with annotate("outer step", 3):
            pass

    made = calls(body)
    assert (made[0], *made[-2:]) == ("annotate", "__enter__", "__exit__")
    assert len(made) <= 6, made  # between them: torch.compiler.is_compiling and what it calls
    assert annotate("a") is annotate("b", 1)
    tracemalloc.start()
    try:
        body()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(1000):
            body()
        assert tracemalloc.get_traced_memory()[0] - before < 1000
    finally:
        tracemalloc.stop()


def test_ranges_inside_compiled_code() -> None:
    """They do not break the graph, whether they are on or off."""

    def body(x: torch.Tensor) -> torch.Tensor:
        with annotate("encoder"), annotate("level", 2):
            return x * 2.0

    for on in (nullcontext, ranges):
        torch.compiler.reset()
        compiled = torch.compile(body, fullgraph=True, backend="eager")
        with on():
            assert compiled(torch.ones(2)).tolist() == [2.0, 2.0]


def test_without_nvtx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(backend, "nvtx", lambda: None)
    with trace(tmp_path / "trace.json"), annotate("head"):
        torch.ones(2).add(1.0)
    assert {"head", "aten::add"} <= names(tmp_path / "trace.json")


def test_the_nvtx_package_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Listener()
    module = type(sys)("nvtx")
    module.push_range, module.pop_range = heard.push, heard.pop  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nvtx", module)
    monkeypatch.setattr(backend, "_package_reason", lambda name: None)
    backend.nvtx.cache_clear()
    try:
        with ranges(), annotate("decode"):
            pass
    finally:
        backend.nvtx.cache_clear()
    assert heard.seen == ["decode"] and heard.depth == 0


def test_a_trace_holds_the_names(tiny_model: FAR, tmp_path: Path) -> None:
    with trace(tmp_path / "new" / "trace.json"):
        sample(tiny_model)
    expected = {"outer step 0", "outer step 1", "level 12", "encoder", "decoder", "head"}
    assert expected <= names(tmp_path / "new" / "trace.json")
    with trace(None), annotate("nobody listens"):
        pass


def test_a_trace_of_what_failed(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with pytest.raises(KeyError), trace(path), annotate("until here"):
        raise KeyError
    assert "until here" in names(path)
    assert [file.name for file in tmp_path.iterdir()] == ["trace.json"]


def test_sample_writes_a_trace(tmp_path: Path, capsys: Captured) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "far")
    output, path = tmp_path / "grid.png", tmp_path / "trace.json"
    arguments = ["sample", str(tmp_path / "far"), "--classes", "1", "--output", str(output)]
    assert cli.main([*arguments, "--backend", "torch", "--quiet", "--trace", str(path)]) == 0
    assert str(path) in capsys.readouterr().out
    assert {"outer step 0", "head", "decode"} <= names(path)
    message = fails(capsys, "sample", str(tmp_path / "far"), "--trace", str(tmp_path))
    assert "--trace" in message and "folder" in message
