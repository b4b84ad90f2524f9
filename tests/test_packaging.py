"""The wheel, from the sdist, with a compiler and without one; the editable install; the checkout.

Nothing is downloaded and the working tree is not touched: a copy of it is built.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD_FILES = ("pyproject.toml", "setup.py", "CMakeLists.txt", "MANIFEST.in", "LICENSE")
CASES = "benchmarks/cases"  # installed as fastfar/bench/cases
LIBRARY = "fastfar/lib/libfastfar_cpu." + ("dylib" if sys.platform == "darwin" else "so")

needs_compiler = pytest.mark.skipif(
    shutil.which("cmake") is None or not any(map(shutil.which, ("c++", "g++", "clang++"))),
    reason="needs CMake and a C++ compiler",
)

# What an installed fastfar must be able to say of itself, wherever it was installed from.
_INSPECT = """
import importlib.util, json, sys
import fastfar.kernels.gpu
from fastfar import _native
from fastfar.bench import cases
library = None if _native.reason() else _native.load().instruction_sets()["scalar"] is None
print(json.dumps({
    "package": fastfar.__path__[0],
    "gpu": fastfar.kernels.gpu.__file__,
    "cases": cases.__file__,
    "native": library,
    "reason": _native.reason(),
}))
"""


# One instruction set, not optimised: what is tested is where the library comes to lie.
_QUICK_BUILD = "-DFASTFAR_SETS=scalar -DCMAKE_CXX_FLAGS_RELEASE=-O0"


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if "FASTFAR_" not in name}
    inherited["CMAKE_ARGS"] = _QUICK_BUILD
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**inherited, "PYTHONPATH": "", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def inspect(python: str | Path, cwd: Path, path: Path | None = None) -> dict[str, object]:
    output = run(python, "-c", _INSPECT, cwd=cwd, PYTHONPATH=str(path or ""))
    result: dict[str, object] = json.loads(output.strip().splitlines()[-1])
    return result


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree as it would be cloned: no native library, no caches."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed in this environment")
    folder = tmp_path_factory.mktemp("checkout")
    for name in (*BUILD_FILES, "README.md"):
        if (ROOT / name).is_file():
            shutil.copy2(ROOT / name, folder / name)
    ignore = shutil.ignore_patterns("__pycache__", "lib", ".*.tmp")
    shutil.copytree(ROOT / "fastfar", folder / "fastfar", ignore=ignore)
    shutil.copytree(ROOT / "kernels", folder / "kernels", ignore=ignore)
    ignore = shutil.ignore_patterns("__pycache__", "results")
    shutil.copytree(ROOT / "benchmarks", folder / "benchmarks", ignore=ignore)
    return folder


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist, as somebody elsewhere would build from it."""
    folder = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", code, cwd=checkout)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return archive.with_suffix("").with_suffix("")


def build_wheel(source: Path, target: Path, **environment: str) -> tuple[Path, str]:
    """The wheel built from a source folder, and what the build said."""
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--verbose")
    said = run(
        *(sys.executable, "-m", "pip", "wheel", source, "--wheel-dir", target, *options),
        cwd=target,
        **environment,
    )
    (wheel,) = target.glob("*.whl")
    return wheel, said


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def unpacked(wheel: Path, target: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def no_compiler(folder: Path) -> dict[str, str]:
    """An environment in which CMake is there and every compiler is missing."""
    tools = folder / "tools"
    tools.mkdir()
    for name in ("cmake", "make", "ninja", "sh", "uname"):
        if (found := shutil.which(name)) is not None:
            (tools / name).symlink_to(found)
    return {"PATH": str(tools), "CC": "", "CXX": ""}


def expected_files(source: Path) -> set[str]:
    """All that the package folder holds is to be installed."""
    return {
        path.relative_to(source).as_posix()
        for path in (source / "fastfar").rglob("*")
        if path.is_file() and not {"__pycache__", "lib"} & set(path.relative_to(source).parts)
    } | {
        f"fastfar/{installed}/{path.name}"
        for installed, folder in (("kernels/gpu", "kernels/gpu"), ("bench/cases", CASES))
        for path in (source / folder).glob("*.py")
    }


def test_sdist_holds_all_that_a_build_needs(sdist: Path, checkout: Path) -> None:
    for name in BUILD_FILES:
        assert (sdist / name).is_file(), name
    for folder in ("fastfar", "kernels", CASES):
        original = {
            path.relative_to(checkout).as_posix()
            for path in (checkout / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert not {name for name in original if not (sdist / name).is_file()}
    assert not list(sdist.rglob("*.so")) and not (sdist / "fastfar" / "lib").exists()


@needs_compiler
def test_wheel_with_a_compiler(sdist: Path, checkout: Path, tmp_path: Path) -> None:
    wheel, _ = build_wheel(sdist, tmp_path, FASTFAR_REQUIRE_NATIVE="1")
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")
    names = contents(wheel)
    installed = {name for name in names if ".dist-info/" not in name}
    assert installed == expected_files(checkout) | {LIBRARY}
    assert {name.split("/")[0] for name in names} == {
        "fastfar",
        next(name.split("/")[0] for name in names if ".dist-info/" in name),
    }, "nothing but fastfar at the top: no module `kernels`"
    site = unpacked(wheel, tmp_path / "site")
    result = inspect(sys.executable, tmp_path, site)
    assert result["native"] is True, result
    assert str(result["package"]) == str(site / "fastfar")
    assert str(result["gpu"]).startswith(str(site / "fastfar" / "kernels" / "gpu"))
    assert str(result["cases"]) == str(site / "fastfar" / "bench" / "cases" / "__init__.py")


def test_wheel_without_a_compiler(sdist: Path, checkout: Path, tmp_path: Path) -> None:
    wheel, said = build_wheel(sdist, tmp_path, **no_compiler(tmp_path))
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "NATIVE LIBRARY NOT BUILT" in said
    assert {name for name in contents(wheel) if ".dist-info/" not in name} == expected_files(
        checkout
    )
    result = inspect(sys.executable, tmp_path, unpacked(wheel, tmp_path / "site"))
    assert result["native"] is None and "was not built" in str(result["reason"])


@pytest.mark.parametrize("missing", ["compiler", "cmake"])
def test_required_native_library_that_cannot_be_built_is_an_error(
    missing: str, sdist: Path, tmp_path: Path
) -> None:
    environment = no_compiler(tmp_path)
    if missing == "cmake":
        environment["PATH"] = str(tmp_path)
    with pytest.raises(AssertionError, match="FASTFAR_REQUIRE_NATIVE=1, but the native library"):
        build_wheel(sdist, tmp_path, FASTFAR_REQUIRE_NATIVE="1", **environment)


def test_editable_install(checkout: Path, tmp_path: Path) -> None:
    """From a fresh environment that sees this one's packages, as `make demo` makes it."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = run(
        *(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"), cwd=tmp_path
    ).strip()
    seen = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (Path(site) / "seen.pth").write_text("\n".join(seen) + "\n")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed")
    run(python, "-m", "pip", "install", *options, "--editable", checkout, cwd=tmp_path)
    result = inspect(python, tmp_path)
    assert str(result["package"]) == str(checkout / "fastfar")
    assert str(result["gpu"]) == str(checkout / "kernels" / "gpu" / "__init__.py")
    assert str(result["cases"]) == str(checkout / CASES / "__init__.py")
    built = (checkout / LIBRARY).is_file()
    assert result["native"] is (True if built else None)
    assert built or needs_compiler.args[0], "a compiler is there and the library was not built"
    version = run(tmp_path / "venv" / "bin" / "fastfar", "--version", cwd=tmp_path)
    assert version.startswith("fastfar ")


def test_bare_checkout(checkout: Path, tmp_path: Path) -> None:
    result = inspect(sys.executable, tmp_path, checkout)
    assert str(result["package"]) == str(checkout / "fastfar")
    assert str(result["gpu"]) == str(checkout / "kernels" / "gpu" / "__init__.py")
    assert str(result["cases"]) == str(checkout / CASES / "__init__.py")


def test_somebody_elses_kernels_package_is_not_picked_up(checkout: Path, tmp_path: Path) -> None:
    """Installed beside fastfar there may be a top-level package `kernels` (Hugging Face's)."""
    shutil.copytree(checkout / "fastfar" / "kernels", tmp_path / "fastfar" / "kernels")
    (tmp_path / "fastfar" / "__init__.py").write_text("")
    (tmp_path / "kernels" / "gpu").mkdir(parents=True)
    (tmp_path / "kernels" / "gpu" / "__init__.py").write_text("")
    code = "import fastfar.kernels as k; print(list(k.__path__))"
    output = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert output.strip() == str([str(tmp_path / "fastfar" / "kernels")])
