# make demo   set up .venv, install, build the native library, sample a grid of images
# make test   the same set-up and the tools of development, then every test that can run here
# make test-gpu       the tests that need a CUDA device
# make test-compile   every Triton kernel as machine code for every architecture and dtype, against
#                     kernels/gpu/budget.json; `make budget` rewrites that file
# make test-attention-libs   tests/attention_libs against the real xformers and flash-attn 4, in an
#                     environment of its own (300 MB), without a GPU
#
# PYTHON=python3.12        another interpreter; a PyTorch 2.6 or newer that it has is used, not replaced
# TORCH=torch==2.9.1       what to install where it has none

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
VENV_ATTENTION := .venv-attention
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# What an installation depends on. The Python sources are used in place.
SOURCES := pyproject.toml setup.py CMakeLists.txt fastfar/_version.py $(wildcard kernels/cpu/*)

.PHONY: demo test test-attention-libs test-gpu test-compile budget lint format wheel clean

demo: $(VENV)/installed
	$(BIN)/fastfar sample --classes 0,1,2,3,4,5,6,7,8,9 --per-class 3 --scale 3 --output outputs/demo.png

# Two files at a time, the longest first (tests/conftest.py): every test uses one thread.
test: $(VENV)/installed-dev
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-gpu: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m gpu

test-compile: $(VENV)/installed-dev
	$(BIN)/python tests/compiled.py

budget: $(VENV)/installed-dev
	$(BIN)/python tests/compiled.py --update

test-attention-libs: $(VENV_ATTENTION)/installed
	$(VENV_ATTENTION)/bin/python -m pytest -W ignore::DeprecationWarning -W ignore::UserWarning tests/attention_libs

lint: $(VENV)/installed-dev
	$(BIN)/python -m pytest tests/test_lint.py

format: $(VENV)/installed-dev
	$(BIN)/python -m ruff check --fix .
	PATH="$(BIN):$$PATH" clang-format -i kernels/cpu/*.cc kernels/cpu/*.h tests/cpp/*.cc tests/cpp/*.h

wheel: $(VENV)/installed-dev
	$(BIN)/python -m build --no-isolation

clean:
	rm -rf $(VENV) $(VENV_ATTENTION) build dist fastfar/lib *.egg-info .pytest_cache .mypy_cache .ruff_cache

# A virtual environment that sees the packages of $(PYTHON) if PyTorch is among them. A .pth file
# rather than --system-site-packages: it also works when $(PYTHON) is itself in an environment.
define SEE_TORCH
import sys
try:
    import torch
except ImportError:
    sys.exit(1)
if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
    sys.exit(1)
print(*(path for path in sys.path if path.endswith(("site-packages", "dist-packages"))), sep="\n")
endef
export SEE_TORCH

$(VENV)/torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fastfar needs Python 3.10 or newer")'
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	@if $(PYTHON) -c "$$SEE_TORCH" > $(VENV)/seen; then \
	  echo "using the PyTorch of $(PYTHON)"; \
	  cp $(VENV)/seen "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch-of-$(notdir $(PYTHON)).pth"; \
	else \
	  echo "installing $(TORCH)"; $(PIP) install "$(TORCH)"; \
	fi
	$(PIP) install "setuptools>=77"
	@touch $@

# CMake from PyPI where there is a compiler but no CMake; if that fails, the install is pure Python.
$(VENV)/cmake: $(VENV)/torch
	@if command -v $${CXX:-c++} > /dev/null && ! command -v cmake > /dev/null; then $(PIP) install cmake || true; fi
	@touch $@

$(VENV)/installed: $(VENV)/cmake $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install --no-build-isolation --editable .
	@$(BIN)/python -c 'from fastfar import _native; print("native library:", _native.reason() or _native.library_path())'
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) install "fastfar[dev]"
	@touch $@

# The attention packages, where they cannot touch the ordinary environment, which they see. What
# asks for PyTorch is installed without what it asks for: theirs would be a CUDA build of gigabytes.
$(VENV_ATTENTION)/installed: $(VENV)/installed-dev
	rm -rf $(VENV_ATTENTION)
	$(BIN)/python -m venv $(VENV_ATTENTION)
	$(BIN)/python -c "$$SEE_TORCH" > $(VENV_ATTENTION)/seen
	cp $(VENV_ATTENTION)/seen "$$($(VENV_ATTENTION)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/seen.pth"
	$(VENV_ATTENTION)/bin/python -m pip --disable-pip-version-check --quiet install --no-deps \
	  xformers==0.0.35 flash-attn-4==4.0.0b36 quack-kernels==0.6.5 torch-c-dlpack-ext==0.1.5
	$(VENV_ATTENTION)/bin/python -m pip --disable-pip-version-check --quiet install \
	  nvidia-cutlass-dsl==4.8.1 "apache-tvm-ffi>=0.1.11,<0.2" einops
	@touch $@
