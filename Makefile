# Every target makes the environment that it needs under build/.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# Processes that tests run in, which share the cores.
WORKERS ?= 2

VENV := build/venv
BIN := $(VENV)/bin
PYTHON_FILES := setup.py mafnet_ops mafnet tests $(wildcard benchmarks)
NATIVE_FILES := $(shell find csrc -type f)
CXX_FILES := $(filter %.h %.cpp %.cu %.cuh,$(NATIVE_FILES) $(shell find tests -type f))

# Ops with kernels, tested again with fresh memory full of NaN.
POISONED := $(addprefix tests/ops/test_,flow_warp.py modulated_deform_conv2d.py deform_align.py)

# Timings, which no other test may run beside.
SPEED := tests/ops/test_speed.py

.PHONY: test test-compat lint format build kernels demo clean
.DELETE_ON_ERROR:

test: build lint
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal --ignore $(SPEED)
	$(BIN)/python -m pytest -q -n $(WORKERS) --poison $(POISONED)
	$(BIN)/python -m pytest -q $(SPEED)

# The drop-ins beside the libraries that they stand in for; torchvision brings a torch of its own, 6 GB in all.
test-compat: build/venv-compat/installed build
	PYTHONPATH=. build/venv-compat/bin/python -m pytest -q tests/compat

lint: $(VENV)/tools
	$(BIN)/ruff check $(PYTHON_FILES)
	$(BIN)/ruff format --check $(PYTHON_FILES)
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy

format: $(VENV)/tools
	$(BIN)/ruff check --fix $(PYTHON_FILES)
	$(BIN)/ruff format $(PYTHON_FILES)
	$(BIN)/clang-format -i $(CXX_FILES)

build: $(VENV)/installed

# All CUDA files for all architectures, whatever torch is installed; then their bars, and those of the Triton kernels.
kernels: $(VENV)/tools
	MAFNET_CUDA=1 $(BIN)/python setup.py -q build_ext --build-lib build/kernels
	$(BIN)/python benchmarks/kernel_report.py
	$(BIN)/python benchmarks/triton_report.py

demo: build/venv-demo/installed
	build/venv-demo/bin/mafnet demo

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "$(TORCH)" "setuptools>=77" ninja
	touch $@

$(VENV)/tools: $(VENV)/torch pyproject.toml
	MAFNET_CUDA=0 $(BIN)/pip install -q --no-build-isolation -e ".[test,lint]"
	touch $@

$(VENV)/installed: $(VENV)/tools $(NATIVE_FILES) setup.py
	MAFNET_REQUIRE_EXT=1 $(BIN)/pip install -q --no-build-isolation --no-deps -e .
	touch $@

build/venv-compat/installed: pyproject.toml
	test -d build/venv-compat || $(PYTHON) -m venv build/venv-compat
	build/venv-compat/bin/pip install -q torch==2.14.1 torchvision==0.29.1 "setuptools>=77" wheel \
	  opencv-python-headless scipy pyyaml tqdm addict yapf rich termcolor platformdirs click requests "pytest>=8" hypothesis
	build/venv-compat/bin/pip install -q --no-deps --no-build-isolation basicsr==1.4.2
	# mmagic refuses later versions of mmcv.
	build/venv-compat/bin/pip install -q --no-deps mmengine==0.10.7 mmcv-lite==2.1.0 mmagic==1.2.0
	touch $@

build/venv-demo/installed: $(NATIVE_FILES) setup.py pyproject.toml $(shell find mafnet mafnet_ops -name '*.py' 2>/dev/null)
	test -d build/venv-demo || $(PYTHON) -m venv build/venv-demo
	build/venv-demo/bin/pip install -q "$(TORCH)"
	build/venv-demo/bin/pip install -q .
	touch $@

clean:
	rm -rf build *.egg-info mafnet_ops/*.so mafnet_ops/_build.json
