"""`--base`: another commit in a worktree, two processes in turns, nothing left behind.

The repository is a made-up one whose `fastfar bench` computes nothing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command import Captured, fails
from example_rows import row

from fastfar.bench import base, compare, rows, timing
from fastfar.cli import _bench_report

ROOT = Path(__file__).resolve().parents[2]

# `fastfar.cli.main` of the made-up repository: asks for every sample as `base.turns` does, without
# PyTorch, and logs its tree, the number of the sample and the text of its native library.
_CLI = """
import json, os, subprocess, sys, time
from pathlib import Path

SECONDS = {seconds}
TREE = Path(__file__).resolve().parents[2]

def main():
    arguments = dict(zip(sys.argv[2::2], sys.argv[3::2]))
    if "--fail" in arguments:
        sys.exit("no such thing")
    print("building", file=sys.stderr, flush=True)
    leave, ask = map(int, arguments["--turns"].split(","))
    library = [path.read_text() for path in (TREE / "fastfar" / "lib").glob("*")]
    repeats = int(arguments["--repeats"])
    for i in range(repeats):
        os.write(ask, b"a")
        assert os.read(leave, 1) == b"g"
        with open(arguments["--log"], "a") as log:
            log.write(f"{{TREE.name}} {{i}} {{library}}\\n")
        if "--hang" in arguments:
            print("hanging", file=sys.stderr, flush=True)
            time.sleep(60)
    git = ["git", "-C", str(TREE), "rev-parse", "--short=12", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    row = json.loads(Path(arguments["--row"]).read_text())
    row["samples_s"] = [SECONDS * (1 + i / 100) for i in range(repeats)]
    row["peak_flops_per_s"] = row["peak_flops_per_s"][:1] * repeats
    row["environment"]["commit"] = commit
    Path(arguments["--save"]).write_text(json.dumps(row) + "\\n")
    return 0
"""
# Its setup.py: the native library is a copy of its source.
_SETUP = """
import shutil, sys
from fastfar_name import NAME
assert sys.argv[1:] == ["--quiet", "build_ext", "--inplace"], sys.argv
shutil.os.makedirs("fastfar/lib")
shutil.copy("kernels/cpu/a.cc", "fastfar/lib/" + NAME)
"""


class Repository:
    """A folder with two commits: the older one takes 2 s an image, the newer one 1 s."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.git("init", "--quiet")
        self.commit(seconds=2.0, kernel="old")
        self.old = self.git("rev-parse", "HEAD")
        self.commit(seconds=1.0, kernel="new")
        library = root / "fastfar" / "lib" / base._native.library_path().name
        library.parent.mkdir()
        library.write_text("new")

    def git(self, *arguments: str) -> str:
        identity = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        command = ["git", "-C", str(self.root), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit(self, seconds: float, kernel: str) -> None:
        files = {
            "fastfar/__init__.py": "",
            "fastfar/cli/__init__.py": _CLI.format(seconds=seconds),
            "fastfar_name.py": f"NAME = {base._native.library_path().name!r}",
            "setup.py": _SETUP,
            "CMakeLists.txt": "",
            "kernels/cpu/a.cc": kernel,
            ".gitignore": "lib/\n__pycache__/\n",
        }
        for name, text in files.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        self.git("add", ".")
        self.git("commit", "--quiet", "-m", kernel)

    def worktrees(self) -> list[str]:
        return self.git("worktree", "list").splitlines()


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    if shutil.which("git") is None:
        pytest.skip("needs git")
    (tmp_path / "here").mkdir()
    return Repository(tmp_path / "here")


def arguments_for(folder: Path, repeats: int) -> list[str]:
    """Of the made-up `fastfar bench`."""
    rows.append(folder / "row.json", [row()])
    return ["--log", str(folder / "log"), "--row", str(folder / "row.json"),
            "--repeats", str(repeats)]  # fmt: skip


def test_two_commits_in_turns(repository: Repository, tmp_path: Path) -> None:
    said: list[str] = []
    folders = (tmp_path / "cache", repository.root)
    a, b = base.measure("HEAD~1", arguments_for(tmp_path, 6), said.append, *folders)
    (found,) = compare.compare(a, b)
    assert found.verdict == "faster" and found.text.startswith("2.00 x faster")
    assert a[0].environment["commit"] == repository.old[:12] != b[0].environment["commit"]
    assert str(a[0].environment["command"]).startswith("fastfar bench --base 'HEAD~1' --log")
    # One sample of each in turn; who is first follows 0110 10; each with its own library.
    lines = [line.split(" ", 2) for line in (tmp_path / "log").read_text().splitlines()]
    assert [i for _, i, _ in lines] == [str(i) for i in range(6) for _ in range(2)]
    first = [line[0] for line in lines[::2]]
    assert first == ["fastfar", "here", "here", "fastfar", "here", "fastfar"]
    assert {(name, library) for name, _, library in lines} == {
        ("fastfar", "['old']"), ("here", "['new']")
    }  # fmt: skip
    assert "A | building" in said and "B | building" in said
    assert len(repository.worktrees()) == 1 and repository.git("status", "--porcelain") == ""
    # The second time the library is there already.
    said.clear()
    tree = tmp_path / "tree"
    base.provide_native(tree, repository.old, *folders[:1], said.append, repository.root)
    assert len(said) == 1 and "built before" in said[0]
    assert [path.read_text() for path in (tree / "fastfar" / "lib").iterdir()] == ["old"]


def test_a_side_that_fails(repository: Repository, tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(OSError, match=r"gave no rows \(status 1\)"):
        base.measure("HEAD~1", ["--fail", "x"], said.append, tmp_path / "cache", repository.root)
    assert "A | no such thing" in said
    assert len(repository.worktrees()) == 1


def test_a_library_that_does_not_build(repository: Repository, tmp_path: Path) -> None:
    (repository.root / "setup.py").write_text("raise SystemExit('no compiler')")
    repository.git("commit", "--quiet", "-am", "broken")
    commit = repository.git("rev-parse", "HEAD")
    with pytest.raises(OSError, match="was not built:\nno compiler"):
        base.measure(commit, [], cache=tmp_path / "cache", root=repository.root)
    assert len(repository.worktrees()) == 1
    # Where this side has none either, both go without.
    for library in (repository.root / "fastfar" / "lib").iterdir():
        library.unlink()
    said: list[str] = []
    base.provide_native(repository.root, commit, tmp_path / "cache", said.append, repository.root)
    assert said[-1] == "neither side has a native library"


def test_interrupted(repository: Repository, tmp_path: Path) -> None:
    """SIGTERM while a side computes: its processes and the worktree are gone."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals go to the main thread")
    seen: list[int] = []

    def say(line: str) -> None:
        if line.endswith("hanging"):
            seen.append(len(repository.worktrees()))
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    arguments = [*arguments_for(tmp_path, 2), "--hang", "1"]
    with pytest.raises(KeyboardInterrupt):
        base.measure("HEAD~1", arguments, say, tmp_path / "cache", repository.root)
    assert signal.getsignal(signal.SIGTERM) is before
    assert seen == [2] and len(repository.worktrees()) == 1
    assert str(tmp_path) not in running()


def running() -> str:
    """Command lines of all processes; "" where the system does not tell."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended since
            found.append(path.read_text(errors="replace"))
    return "\n".join(found)


def test_turns_of_a_child() -> None:
    (leave, give), (hear, ask) = os.pipe(), os.pipe()
    os.write(give, base.GO)
    with base.turns(f"{leave},{ask}"):
        timing.before_sample.get()()
        assert os.read(hear, 1) == base.ASK
        os.close(give)
        with pytest.raises(OSError, match="is gone"):
            timing.before_sample.get()()
    timing.before_sample.get()()  # outside nobody is asked
    with base.turns(None):
        timing.before_sample.get()()
    with pytest.raises(ValueError, match="two open descriptors"), base.turns("x"):
        pass
    for pipe in (leave, hear, ask):
        os.close(pipe)


def test_samples_ask_before_they_are_taken() -> None:
    """The timing loop of the harness: one question a sample."""
    asked: list[int] = []
    taken: list[int] = []
    token = timing.before_sample.set(lambda: asked.append(len(taken)))
    try:
        timing.alternate([_contender(lambda: taken.append(1))], repeats=3)
    finally:
        timing.before_sample.reset(token)
    assert asked == [0, 1, 2]


def _contender(call: Callable[[], object]) -> timing.Contender:
    def seconds() -> float:
        call()
        return 1.0

    timer = timing.Timer("wall", seconds)
    return timing.Contender("x", torch.float32, lambda: None, timer=timer)


def test_errors(capsys: Captured, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a git checkout"):
        base.commit_of("HEAD", tmp_path)
    if (ROOT / ".git").exists() and shutil.which("git") is not None:
        assert "no such commit here" in fails(capsys, "bench", "--base", "no-such-revision")
        assert "no such commit here" in fails(capsys, "bench", "--base=--help")
    assert "memory takes none" in fails(capsys, "bench", "memory", "--base", "HEAD")
    assert "starts afresh" in fails(
        capsys, "bench", "--base", "HEAD", "--resume", "--save", str(tmp_path / "x.jsonl")
    )


def test_what_is_passed_on() -> None:
    arguments = ["bench", "ops", "--base", "HEAD", "--repeats", "3", "--save=x", "--batch", "1",
                 "2", "--json", "--quick"]  # fmt: skip
    passed = ["ops", "--repeats", "3", "--batch", "1", "2", "--quick"]
    assert _bench_report._passed_on(arguments) == passed
