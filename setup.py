"""Build of fastfar: the Python package, and the native CPU library where it can be built.

Everything static is in pyproject.toml. Here: the package list, which maps `kernels/gpu` to
`fastfar.kernels.gpu` (a top-level module `kernels` would collide with Hugging Face's) and
`benchmarks/cases` to `fastfar.bench.cases`, and CMake.
Without a working compiler the wheel is pure Python and the build says so;
FASTFAR_REQUIRE_NATIVE=1 makes that an error; CMAKE_ARGS holds further options for CMake.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
LIBRARY = "libfastfar_cpu." + ("dylib" if sys.platform == "darwin" else "so")


def native_required() -> bool:
    """Value of FASTFAR_REQUIRE_NATIVE: 1, or 0 (the default)."""
    value = os.environ.get("FASTFAR_REQUIRE_NATIVE", "") or "0"
    if value not in ("0", "1"):
        raise SystemExit(f"FASTFAR_REQUIRE_NATIVE={value} is not known; allowed: 0, 1")
    return value == "1"


def build_requirements() -> list[str]:
    """CMake from PyPI, where there is a compiler but no CMake and pip asks what the build needs."""
    compiler = os.environ.get("CXX", "").split() or ["c++", "g++", "clang++"]
    asked = "egg_info" in sys.argv
    has_compiler = any(shutil.which(name) for name in compiler)
    return ["cmake>=3.18"] if asked and has_compiler and shutil.which("cmake") is None else []


class BuildNative(build_ext):
    """Runs CMake and puts the library into `fastfar/lib/`; drops it, loudly, if that fails."""

    def run(self) -> None:
        target = (ROOT if self.inplace else Path(self.build_lib)) / "fastfar" / "lib"
        shutil.rmtree(target, ignore_errors=True)  # never ship the library of an earlier build
        try:
            library = self.cmake()
        except (OSError, subprocess.CalledProcessError) as error:
            if native_required():
                raise SystemExit(
                    f"fastfar: FASTFAR_REQUIRE_NATIVE=1, but the native library was not built: "
                    f"{error}. It needs CMake 3.18 and a C++17 compiler."
                ) from error
            print(
                f"*** fastfar: NATIVE LIBRARY NOT BUILT, installing pure Python: {error} ***",
                file=sys.stderr,
                flush=True,
            )
            self.distribution.ext_modules = []
            return
        target.mkdir(parents=True)
        shutil.copy2(library, target / LIBRARY)

    def cmake(self) -> Path:
        """Configure and build; returns the library. OSError or CalledProcessError on failure."""
        if shutil.which("cmake") is None:
            raise FileNotFoundError("cmake not found")
        folder = Path(self.build_temp).resolve() / "cmake"
        # Configured from nothing each time: a cache remembers a compiler that may be gone.
        shutil.rmtree(folder, ignore_errors=True)
        options = ["-DCMAKE_BUILD_TYPE=Release", *shlex.split(os.environ.get("CMAKE_ARGS", ""))]
        subprocess.run(["cmake", "-S", str(ROOT), "-B", str(folder), *options], check=True)
        jobs = str(os.cpu_count() or 1)
        subprocess.run(["cmake", "--build", str(folder), "--parallel", jobs], check=True)
        return folder / LIBRARY

    def get_outputs(self) -> list[str]:
        library = Path(self.build_lib) / "fastfar" / "lib" / LIBRARY
        return [str(library)] if self.extensions and not self.inplace else []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BuildPython(build_py):
    """Starts from an empty folder: modules deleted since the last build must not be shipped."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "fastfar", ignore_errors=True)
        super().run()


class Wheel(bdist_wheel):
    """py3-none-<platform> with the library (no Python or torch ABI in it), py3-none-any without."""

    @property
    def root_is_pure(self) -> bool:
        return not self.distribution.has_ext_modules()  # known after build_ext only

    @root_is_pure.setter
    def root_is_pure(self, value: bool | None) -> None:
        """The base class sets this too early."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


MAPPED = {"fastfar.kernels.gpu": "kernels/gpu", "fastfar.bench.cases": "benchmarks/cases"}

setup(
    packages=[*find_packages(include=["fastfar", "fastfar.*"]), *MAPPED],
    package_dir=MAPPED,
    ext_modules=[Extension("fastfar.lib.fastfar_cpu", sources=[])],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython, "bdist_wheel": Wheel},
    setup_requires=build_requirements(),
)
