"""The conventions of the repository, as tests.

The naming law: choose an op's name once. Device code is `kernels/<device>/<name>.*`, its meaning
`fastfar/ops/<name>.py`, its truth the function `<name>` of `fastfar.reference`, its proof
`tests/ops/test_<name>.py`, its price one `Case("<name>")` in `benchmarks/cases/`.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import fastfar

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fastfar"
CPU = ROOT / "kernels" / "cpu"
GPU = ROOT / "kernels" / "gpu"
CASES = ROOT / "benchmarks" / "cases"

# Frozen: scripts outside this repository call these names.
PUBLIC = {
    "FAR",
    "FARConfig",
    "FARPipeline",
    "KLVAE",
    "SamplingPlan",
    "TensorNoise",
    "TrainingDraws",
    "diffusion_loss",
    "load_official",
    "sample_latents",
}
ALSO_PUBLIC = {"PixelTokenizer", "SeededNoise", "Solver", "__version__"}

# Imports run one way: a module imports from its own layer and from those above it in this list.
LAYERS: tuple[set[str], ...] = (
    {"_version", "_files", "_memory", "_native", "_packages", "_tables", "_weights", "backend"}
    | {"_recipes", "config", "kernels", "packing", "profiling"},
    {"diagonal_gaussian", "diffusion", "levels", "noise", "plan", "rows", "solver"}
    | {"_coefficients"},
    {"ops"},
    {"head", "diffloss", "transformer", "nn", "kl_vae", "tokenizer", "model", "moments", "prepared"}
    | {"checkpoint"},
    {"data", "decoding", "sampling", "outer_step", "graphs", "training", "baselines"},
    {"pipeline", "pictures"},
    {"evaluation", "costs"},
    {"bench", "experiments"},
    {"cli", "__main__"},
)
USES_REFERENCE = ("sampling", "ops", "evaluation", "costs", "bench", "cli")
LAYER = {module: index for index, layer in enumerate(LAYERS) for module in layer}

NOT_OPS = {"isa", "table", "threads"}  # sources of kernels/cpu that belong to all kernels
TESTED_PARTS = {"threads"}  # those of them that have a C++ test of their own
# Kernels that are no op of the model: weights in tile order, the yardstick of the benchmarks, and
# the proof of dispatch and product.
SELF_TEST = {"pack", "peak", "selftest"}
MAX_LINES = 450


def python_files(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def found(paths: list[Path], matches: type[ast.AST], condition: Callable[[Any], bool]) -> list[str]:
    """Places of the nodes of a type that meet a condition, as file:line."""
    return [
        f"{relative(path)}:{node.lineno}"
        for path in paths
        for node in ast.walk(tree(path))
        if isinstance(node, matches) and condition(node)
    ]


def op_names() -> list[str]:
    return sorted(path.stem for path in (PACKAGE / "ops").glob("[!_]*.py"))


def kernel_names() -> set[str]:
    """Ops with device code; an op's backward may have a source of its own."""
    cpu = {path.stem for path in CPU.glob("*.cc")} - NOT_OPS - SELF_TEST
    cpu = {name.removesuffix("_backward") for name in cpu}
    return cpu | {path.stem for path in GPU.glob("[!_]*.py")}


# --- the naming law --------------------------------------------------------------------------


def test_there_are_ops() -> None:
    assert "attention" in op_names() and "denoise_loop" in op_names()


@pytest.mark.parametrize("name", op_names())
def test_an_op_has_one_name_everywhere(name: str) -> None:
    operation = getattr(importlib.import_module("fastfar.ops"), name, None)
    assert callable(operation), f"fastfar.ops does not export {name}"
    truth = getattr(importlib.import_module("fastfar.reference"), name, None)
    assert callable(truth), f"fastfar.reference has no function {name}"
    parameters = list(inspect.signature(operation).parameters)
    # The reference has no dropout (random, in training only) and no choice of implementation.
    parameters = [p for p in parameters if p not in ("dropout", "implementation", "attention")]
    assert parameters == list(inspect.signature(truth).parameters), "not its reference's signature"
    assert (ROOT / "tests" / "ops" / f"test_{name}.py").is_file(), f"no tests/ops/test_{name}.py"
    pattern = rf'\bCase\(\s*(?:name=|op=)?"{name}"'
    files = [path for path in python_files(CASES) if re.search(pattern, path.read_text("utf-8"))]
    assert len(files) == 1, f'Case("{name}") belongs into one file of {relative(CASES)}: {files}'


def test_every_kernel_test_and_case_belongs_to_an_op() -> None:
    ops = set(op_names())
    assert kernel_names() <= ops, "device code without fastfar/ops/<name>.py"
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests/ops").glob("test_*.py")}
    assert tests <= ops, f"tests of ops that are not there: {sorted(tests - ops)}"
    cases = set(importlib.import_module("fastfar.bench.cases").CASES)
    assert cases <= ops, f"cases of ops that are not there: {sorted(cases - ops)}"


def test_cmake_lists_the_kernels_of_the_folder() -> None:
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    block = re.search(r"set\(FASTFAR_OPS\s+([^)]*)\)", text)
    assert block is not None
    assert sorted(block[1].split()) == sorted(
        {path.stem for path in CPU.glob("*.cc")} - NOT_OPS
    )
    for name in block[1].split():
        assert (ROOT / "tests" / "cpp" / f"{name}_test.cc").is_file(), f"{name} has no C++ test"
    tests = {path.stem.removesuffix("_test") for path in (ROOT / "tests/cpp").glob("*.cc")}
    assert tests <= {*block[1].split(), *TESTED_PARTS}, "a C++ test of nothing that is there"
    for name in TESTED_PARTS:
        assert f"add_test(NAME {name} " in text, f"CMake does not run {name}_test"


# --- who may import what ---------------------------------------------------------------------


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, relative imports made absolute."""
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "fastfar":
                yield from (f"fastfar.{alias.name}" for alias in node.names)
            else:
                yield module


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def test_imports_run_one_way() -> None:
    wrong = []
    for path in python_files(PACKAGE):
        module = layer_of(path)
        if module in ("__init__", "reference"):
            continue
        assert module in LAYER, f"say in LAYERS where fastfar.{module} belongs"
        for name in imported(path):
            parts = name.split(".")
            if parts[0] != "fastfar":
                continue
            target = parts[1] if len(parts) > 1 else ""
            if module == "cli" and (target == "" or target in PUBLIC | ALSO_PUBLIC):
                continue  # a command may use the public interface, as any user
            if target not in LAYER and target != "reference":
                wrong.append(f"{relative(path)}: {name} (import from the module that defines it)")
            elif target == "reference" and module not in USES_REFERENCE:
                wrong.append(f"{relative(path)}: {name} (the reference is not for {module})")
            elif target != "reference" and LAYER[target] > LAYER[module]:
                wrong.append(f"{relative(path)}: {name} (a layer further up)")
    assert not wrong, "\n".join(wrong)


def test_the_reference_imports_torch_only() -> None:
    allowed = {"torch", "__future__", "fastfar"} | set(sys.stdlib_module_names)
    for path in python_files(PACKAGE / "reference"):
        for name in imported(path):
            assert name.split(".")[0] in allowed, f"{relative(path)} imports {name}"
            if name.startswith("fastfar"):
                assert name.startswith("fastfar.reference"), f"{relative(path)} imports {name}"


def test_kernels_do_not_import_the_package() -> None:
    for path in python_files(ROOT / "kernels"):
        for name in imported(path):
            assert not name.startswith("fastfar"), f"{relative(path)} imports {name}"


def test_cpp_includes() -> None:
    """No framework anywhere; in what is compiled per instruction set, no library templates."""
    plain = {"cstdint", "cstddef", "cstring", "immintrin.h", "arm_neon.h"}
    sources = [*CPU.glob("*.cc"), *CPU.glob("*.h"), *(ROOT / "tests" / "cpp").glob("*.cc")]
    assert len(sources) >= 5
    for path in sources:
        text = path.read_text(encoding="utf-8")
        system = set(re.findall(r"#include <([^>]+)>", text))
        for header in system:
            assert not re.match(r"torch|ATen|c10|Python\.h|pybind", header), (path.name, header)
        if path.suffix == ".cc" and path.parent == CPU and path.stem not in NOT_OPS:
            assert system <= plain, f"{path.name} includes {sorted(system - plain)}"
            assert "namespace FASTFAR_TARGET {" in text, path.name


def test_packages_are_packages() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), "kernels must not be importable"
    assert (GPU / "__init__.py").is_file()
    for folder in {path.parent for path in python_files(PACKAGE)}:
        assert (folder / "__init__.py").is_file(), f"{relative(folder)} would not be installed"


# --- habits ----------------------------------------------------------------------------------


def is_call_of(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def is_attribute(node: ast.AST, *names: str) -> bool:
    return isinstance(node, ast.Attribute) and node.attr in names


def test_no_print_in_the_library() -> None:
    files = [path for path in python_files(PACKAGE) if layer_of(path) != "cli"]
    assert not found(files, ast.Call, lambda node: is_call_of(node, "print"))


def test_no_cuda_method_and_no_bare_except() -> None:
    files = python_files(PACKAGE, ROOT / "kernels", ROOT / "tests", ROOT / "benchmarks")
    assert not found(files, ast.Call, lambda node: is_attribute(node.func, "cuda"))
    assert not found(files, ast.ExceptHandler, lambda node: node.type is None)


def test_only_the_backend_looks_at_the_machine() -> None:
    """Environment variables, hardware and optional packages are probed in one file."""
    probes = ("environ", "getenv", "is_available", "get_device_capability", "get_capabilities")
    allowed = (PACKAGE / "backend.py", PACKAGE / "_packages.py")
    files = [path for path in python_files(PACKAGE, GPU) if path not in allowed]
    assert not found(files, ast.Attribute, lambda node: is_attribute(node, *probes, "find_spec"))
    assert not found(
        files,
        ast.ImportFrom,
        lambda node: node.module == "os" and {"environ", "getenv"} & {a.name for a in node.names},
    )


def test_six_environment_variables_each_documented_once() -> None:
    names = set()
    for path in [*python_files(PACKAGE), ROOT / "setup.py"]:
        names |= set(re.findall(r"FASTFAR_[A-Z_]*[A-Z]", path.read_text(encoding="utf-8")))
    documented = ast.get_docstring(tree(PACKAGE / "backend.py")) or ""
    assert names == set(re.findall(r"^(FASTFAR_[A-Z_]+)", documented, re.MULTILINE))
    assert len(names) == 6


def test_files_are_short_and_ascii() -> None:
    folders = (PACKAGE, ROOT / "kernels", ROOT / "tests", ROOT / "benchmarks")
    files = [
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.suffix in (".py", ".cc", ".h")
    ]
    for path in [*files, ROOT / "setup.py"]:
        text = path.read_text(encoding="utf-8")
        assert text.isascii(), f"{relative(path)} is not ASCII"
        assert len(text.splitlines()) <= MAX_LINES, f"{relative(path)} is too long"


def test_nothing_names_a_machine_or_a_registry() -> None:
    hosts = ["pypi" + ".org", "python" + "hosted", "/wo" + "rk/", "/ro" + "ot/", "/ho" + "me/"]
    pattern = re.compile("|".join(map(re.escape, hosts)))
    skipped = {".git", ".venv", ".venv-attention", "build", "dist", "outputs", "data", "lib"}
    skipped |= {"golden", "__pycache__"}
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        if skipped & set(parts) or any(part.endswith(("_cache", ".egg-info")) for part in parts):
            continue
        if path.suffix in (".py", ".md", ".toml", ".txt", ".in", ".yaml", ".cc", ".h", ".json"):
            hit = pattern.search(path.read_text(encoding="utf-8"))
            assert hit is None, f"{relative(path)} names {hit and hit[0]}"


# --- the public interface --------------------------------------------------------------------


def test_public_names_are_frozen() -> None:
    names = set(fastfar.__all__)
    assert names >= PUBLIC, f"missing: {sorted(PUBLIC - names)}"
    assert names <= PUBLIC | ALSO_PUBLIC, f"new: {sorted(names - PUBLIC - ALSO_PUBLIC)}"
    for name in names:
        assert getattr(fastfar, name) is not None
