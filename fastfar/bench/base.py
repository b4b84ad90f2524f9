"""`fastfar bench --base REV`: this working tree beside another commit, in turns, in one run.

REV is checked out into a temporary git worktree, its native library built there (or taken from a
cache, by the content of its sources). A child process per side runs the same `fastfar bench`; each
asks for leave before every sample, and the parent lets one of them go at a time, in an order that
neither drift nor being first can favour. What comes out are two sets of rows for
`fastfar.bench.compare`: A is REV, B the working tree. The worktree goes when the run ends, however
it ends.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from fastfar import _native
from fastfar.bench import rows, timing
from fastfar.bench.rows import Row

ROOT = Path(__file__).resolve().parents[2]
NATIVE_SOURCES = ("kernels/cpu", "CMakeLists.txt", "setup.py")
REST = 0.05  # seconds: the threads of the side that has just stopped go on spinning for a while
GO, ASK = b"g", b"a"

# Runs the `fastfar` of the tree that is its first argument, wherever it is started.
_CHILD = """
import sys
tree = sys.argv.pop(1)
sys.path[:] = [tree, *(path for path in sys.path if path)]
sys.argv[0] = "fastfar"
from fastfar.cli import main
sys.exit(main())
"""

Say = Callable[[str], object]


@dataclass(frozen=True)
class Side:
    """One of the two: "A" or "B", its source tree, the commit that it was checked out from."""

    name: str
    tree: Path
    commit: str


# --- the other commit ------------------------------------------------------------------------


def git(*arguments: str, root: Path | None = None) -> str:
    """Output of a git command; ValueError with what git said where it fails."""
    command = ["git", "-C", str(root or ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise ValueError("--base needs git, which is not installed") from error
    except subprocess.CalledProcessError as error:
        raise ValueError(f"git {arguments[0]}: {error.stderr.strip()}") from error
    return done.stdout.strip()


def commit_of(revision: str, root: Path | None = None) -> str:
    """Full hash of a revision.

    Raises:
        ValueError: this fastfar is no git checkout, or there is no such commit in it.
    """
    root = root or ROOT
    if not (root / ".git").exists():
        raise ValueError(
            f"--base needs a git checkout of fastfar, and {root} is none: clone it and run there"
        )
    try:
        return git("rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}", root=root)
    except ValueError as error:
        raise ValueError(
            f"--base {revision}: no such commit here; give a hash, a tag, a branch or HEAD~1"
        ) from error


@contextmanager
def worktree(commit: str, root: Path | None = None) -> Iterator[Path]:
    """A folder with that commit, removed at the end; those that a killed run left behind as well.

    Raises:
        ValueError: git cannot make it.
    """
    root = root or ROOT
    git("worktree", "prune", root=root)
    with tempfile.TemporaryDirectory(prefix="fastfar-base-") as folder:
        tree = Path(folder) / "fastfar"
        git("worktree", "add", "--detach", "--quiet", str(tree), commit, root=root)
        try:
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree), root=root)


def native_key(commit: str, root: Path | None = None) -> str | None:
    """Hash of all that the native library of a commit is built from; None: it has none."""
    try:
        found = [git("rev-parse", f"{commit}:{name}", root=root) for name in NATIVE_SOURCES]
    except ValueError:
        return None
    machine = f"{sys.platform} {platform.machine()}"
    return hashlib.sha256("\n".join([machine, *found]).encode()).hexdigest()[:16]


def provide_native(
    tree: Path, commit: str, cache: Path, say: Say, root: Path | None = None
) -> None:
    """Put the native library of a commit into its tree: from the cache, else built, then cached.

    Where it cannot be built, and this working tree has one, that is an error; where neither side
    has one, both run without.

    Raises:
        OSError: it does not build.
    """
    key = native_key(commit, root)
    if key is None:
        return
    name = _native.library_path().name
    target, kept = tree / "fastfar" / "lib" / name, cache / key / name
    if kept.is_file():
        say(f"native library of {commit[:12]}: built before, from the same sources")
    else:
        say(f"native library of {commit[:12]}: building")
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
        if not target.is_file():
            if not ((root or ROOT) / "fastfar" / "lib" / name).is_file():
                say("neither side has a native library")
                return
            said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
            raise OSError(f"the native library of {commit[:12]} was not built:\n{said}")
        kept.parent.mkdir(parents=True, exist_ok=True)
        unfinished = kept.with_suffix(f".{os.getpid()}")
        shutil.copy2(target, unfinished)
        unfinished.replace(kept)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(kept, target)


# --- turns -----------------------------------------------------------------------------------


@contextmanager
def turns(pipes: str | None) -> Iterator[None]:
    """In a child: ask the parent before every sample, and wait for its leave.

    Args:
        pipes: "R,W", open file descriptors to read leave from and to ask on; None: no parent.

    Raises:
        ValueError: pipes is something else.
        OSError: at a sample, where the parent is gone.
    """
    if pipes is None:
        yield
        return
    try:
        leave, ask = (int(each) for each in pipes.split(","))
        os.fstat(leave), os.fstat(ask)
    except (ValueError, OSError) as error:
        raise ValueError(f"--turns is for --base: two open descriptors, got {pipes!r}") from error

    def wait() -> None:
        os.write(ask, ASK)
        if os.read(leave, 1) != GO:
            raise OSError("the process that gives the turns is gone")

    before = timing.before_sample.set(wait)
    try:
        yield
    finally:
        timing.before_sample.reset(before)


class _Child:
    """The process of a side. It runs only between `grant` (or `start`) and its next question."""

    def __init__(self, side: Side, arguments: Sequence[str], save: Path, say: Say) -> None:
        self.side, self.save, self.say = side, save, say
        self.waits = False
        leave, self._leave = os.pipe()
        self._ask, ask = os.pipe()
        command = [sys.executable, "-c", _CHILD, str(side.tree), "bench", *arguments]
        command += ["--save", str(save), "--turns", f"{leave},{ask}"]
        try:
            self.process = subprocess.Popen(
                command,
                pass_fds=(leave, ask),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        finally:
            os.close(leave)
            os.close(ask)
        self._reader = threading.Thread(target=self._forward, daemon=True)
        self._reader.start()

    def _forward(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.say(f"{self.side.name} | {line.rstrip()}")

    def until_it_asks(self) -> None:
        """Wait for its next question; `waits` tells whether there was one, or it has ended."""
        self.waits = os.read(self._ask, 1) == ASK

    def grant(self) -> None:
        """One turn."""
        time.sleep(REST)
        try:
            os.write(self._leave, GO)
        except BrokenPipeError:  # it has ended since
            self.waits = False
            return
        self.until_it_asks()

    def rows(self) -> list[Row]:
        """What it measured.

        Raises:
            OSError: it failed, before it had measured anything.
            ValueError: it does not know --turns, or measured another tree than its own.
        """
        status = self.process.wait()
        self._reader.join(timeout=5)
        found = rows.read(self.save) if self.save.is_file() else []
        if not found:
            hint = (
                "; a commit from before --base does not know --turns" if status == 2 else ""
            )
            raise OSError(
                f"fastfar bench of {self.side.commit[:12]} gave no rows (status {status}){hint}"
            )
        for row in found:
            if not self.side.commit.startswith(str(row.environment.get("commit"))):
                raise ValueError(
                    f"{self.side.name} is {self.side.commit[:12]}, but commit "
                    f"{row.environment.get('commit')} was measured"
                )
        return found

    def stop(self) -> None:
        """End it, whatever it does."""
        for pipe in (self._leave, self._ask):
            os.close(pipe)  # a child that waits sees the end
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def alternate(children: Sequence[_Child]) -> None:
    """Give turns until both have ended: one sample of the one, then the same of the other.

    Which is first follows Thue and Morse (0110 1001 ...), so that no stride of turns, and no steady
    drift, favours one of them.
    """
    turn = 0
    while waiting := [child for child in children if child.waits]:
        for child in reversed(waiting) if turn.bit_count() % 2 else waiting:
            child.grant()
        turn += 1


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does: with everything cleaned up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def measure(
    revision: str,
    arguments: Sequence[str],
    say: Say = lambda _: None,
    cache: Path | None = None,
    root: Path | None = None,
) -> tuple[list[Row], list[Row]]:
    """Rows of `fastfar bench *arguments` of a revision (A) and of the working tree (B), in turns.

    Args:
        revision: anything that git takes for a commit.
        arguments: of `fastfar bench`, without --base and --save.
        say: takes what happens, line by line; lines of the two sides begin with "A | " and "B | ".
        cache: folder of native libraries; None is ~/.cache/fastfar/native.
        root: of the working tree; None is the one that this module lies in.

    Raises:
        ValueError: no git checkout, or no such commit; a side measured another tree.
        OSError: a library does not build, or a side gave no rows.
    """
    root = root or ROOT
    commit = commit_of(revision, root)
    cache = cache or Path.home() / ".cache" / "fastfar" / "native"
    with _terminable(), ExitStack() as stack:
        tree = stack.enter_context(worktree(commit, root))
        say(f"A is {commit[:12]} ({revision}), B the working tree")
        provide_native(tree, commit, cache, say, root)
        sides = (Side("A", tree, commit), Side("B", root, commit_of("HEAD", root)))
        children = []
        for side in sides:
            children.append(_Child(side, arguments, tree.parent / f"{side.name}.jsonl", say))
            stack.callback(children[-1].stop)
            children[-1].until_it_asks()  # builds, checks and warms up until its first sample
        alternate(children)
        command = shlex.join(["fastfar", "bench", "--base", revision, *arguments])
        found = [[_named(row, command) for row in child.rows()] for child in children]
        return found[0], found[1]


def _named(row: Row, command: str) -> Row:
    """With the command that the user gave, not that of the child."""
    return dataclasses.replace(row, environment={**row.environment, "command": command})
