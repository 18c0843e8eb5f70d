# Two commands on a fresh machine with Python 3.11, a C++ compiler and PyPI: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# On a machine without a GPU, the CPU build of torch saves gigabytes: make quickstart PIP_ARGS="--index-url URL"
# with the URL that pytorch.org gives for CPU.
PIP_ARGS ?=

.PHONY: setup quickstart test test-slow test-gpu bench lint type format clean

setup: $(READY)

$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed, found " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,quickstart,curate]'
	touch $(READY)

quickstart: setup
	examples/quickstart/quickstart.sh

# One thread for each process: the tests start up to eight.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

# Against peers, as ratios: make bench ROW=preprocess (see bench/preprocess.py for what it can be given).
bench: setup
	$(BIN)/python -m bench $(ROW)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: setup
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build *.egg-info megatron_cpt/data/*.so runs/quickstart .pytest_cache .mypy_cache .ruff_cache
