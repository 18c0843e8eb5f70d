# Two commands on a fresh machine with Python 3.11, a C++ compiler and PyPI: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# On a machine without a GPU, the CPU build of torch saves gigabytes: make quickstart PIP_ARGS="--index-url URL"
# with the URL that pytorch.org gives for CPU.
PIP_ARGS ?=

.PHONY: setup quickstart quickstart-chat test test-engine test-runs test-matrix test-kills test-slow test-llamafactory te test-te test-gpu test-slurm mutants sanitize cuda bench lint type format docs clean

setup: $(READY)

$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed, found " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,quickstart,curate]'
	touch $(READY)

quickstart: setup
	VENV=$(CURDIR)/$(VENV) examples/quickstart/quickstart.sh

# What follows: SFT, DPO and evaluation of the quickstart's result.
quickstart-chat: setup
	test -e runs/quickstart/hf-cpt/config.json || VENV=$(CURDIR)/$(VENV) examples/quickstart/quickstart.sh
	VENV=$(CURDIR)/$(VENV) examples/quickstart_chat/quickstart_chat.sh

# One thread for each process, and two tests at a time: some start eight processes. File by file, in order.
WORKERS ?= 2
test: setup
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu and not slurm" -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 30

# What touches the engine, for another Python and with it another megatron-core:
# make test-engine PYTHON=python3.12 VENV=.venv-3.12
ENGINE := tests/platforms tests/model tests/checkpoint tests/convert tests/corpus/test_indexed_dataset.py tests/mixture/test_loader.py \
  $(patsubst %,tests/training/test_%.py,golden hf_losses layouts matrix packed resume_layouts damaged hostile_checkpoints)
test-engine: setup
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" -n $(WORKERS) --dist loadfile --durations 10 $(ENGINE)

# What `make test` leaves out, in parts. Runs that are killed, sharded, a job array's or of 16 processes, which take a minute each:
LONG_RUNS := tests/training/test_kill.py tests/posttrain/test_sharding.py tests/study/test_study.py tests/examples
test-runs: setup
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not overnight" -n $(WORKERS) --dist load $(LONG_RUNS)

# The rest of the 108 layouts, recomputations and precisions (`make test` has each layout once). Not in CI.
test-matrix: setup
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n $(WORKERS) --dist load tests/training/test_matrix.py

# One run that is killed 60 times. Not in CI.
test-kills: setup
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m overnight -s tests/training/test_kill.py

test-slow: setup
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

# What `export_to` writes, read by LLaMA-Factory itself, in an environment of its own: it wants other versions (4 GB of packages).
LLAMAFACTORY := .venv-llamafactory
test-llamafactory: setup
	test -x $(LLAMAFACTORY)/bin/python || $(PYTHON) -m venv $(LLAMAFACTORY)
	$(LLAMAFACTORY)/bin/python -m pip install --quiet llamafactory==0.9.5 torch==2.10.0 torchaudio==2.10.0
	LLAMAFACTORY_PYTHON=$(CURDIR)/$(LLAMAFACTORY)/bin/python $(BIN)/python -m pytest tests/posttrain/test_llamafactory.py

# Checkpoints in Transformer Engine's layers, without a GPU: its Python from PyPI, and a stand-in for its compiled extension.
# Another Python wants a folder of its own: make test-te PYTHON=python3.12 VENV=.venv-3.12
TE := build/transformer_engine$(VENV:.venv%=%)
TE_VERSION := 2.20.2
te: $(TE)/ready
test-te: setup te
	TRANSFORMER_ENGINE=$(CURDIR)/$(TE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/te_layers

$(TE)/ready: tests/te_layers/stand_in.py | setup
	$(BIN)/python -m pip install --quiet --target $(TE) --no-deps --upgrade transformer_engine==$(TE_VERSION) \
	  transformer_engine_cu13==$(TE_VERSION) onnxscript onnx onnx_ir ml_dtypes protobuf triton einops
	$(BIN)/python tests/te_layers/stand_in.py $(TE)
	touch $@

# What needs a GPU, and what runs on whichever device there is. `make cuda` first, for the order of the data.
GPU := tests/platforms/test_cuda_platform.py tests/mixture/order/test_cuda.py
ANY_DEVICE := tests/model/test_parity.py tests/training/test_packed.py
test-gpu: setup
	$(BIN)/python -m pytest $(GPU) -n $(WORKERS)
	$(BIN)/python -m pytest $(ANY_DEVICE)

# On a real SLURM of three nodes that the tests start on this host. Root on Debian gets the packages; where they cannot be had, the
# tests are skipped, and say why. CI leaves out those that are slow and come near to others.
SLURM_TESTS ?= slurm
SLURM_PACKAGES := slurmctld slurmd slurm-client munge iproute2
test-slurm: setup
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! command -v slurmctld >/dev/null; then \
	  apt-get update && apt-get install -y --no-install-recommends $(SLURM_PACKAGES) || \
	  echo "SLURM's packages cannot be installed"; fi
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "$(SLURM_TESTS)" tests/slurm

# The code broken in one place at a time: each time a test has to fail. Half an hour or more; not in CI.
mutants: setup
	$(BIN)/python tests/mutants/run.py --jobs $(WORKERS)

# The native code's tests under AddressSanitizer and UndefinedBehaviorSanitizer.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all -g -O1
sanitize: setup
	CFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" $(BIN)/python setup.py --quiet build --build-base build/sanitize --build-lib build/sanitized
	CFLAGS="$(SANITIZE)" LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so.6)" \
	  ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/sanitized OMP_NUM_THREADS=1 \
	  $(BIN)/python -P -m pytest -q -p no:cacheprovider tests/mixture/order/test_native.py tests/mixture/order/test_megatron.py

# The data order on a GPU: a library that megatron_cpt.mixture.order.cuda loads. Needs nvcc, not a GPU.
CUDA_LIBRARY := megatron_cpt/lib/libmegatron_cpt_cuda.so
ARCHITECTURES := -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90
cuda: $(CUDA_LIBRARY)
$(CUDA_LIBRARY): csrc/sampling_cuda.cu csrc/backend_cuda.h csrc/sampling_order.h csrc/sampling_core.h
	mkdir -p $(@D)
	nvcc -std=c++17 -O3 -shared -Xcompiler -fPIC,-fvisibility=hidden $(ARCHITECTURES) $< -o $@

# Against peers, as ratios: make bench ROW=preprocess (see bench/preprocess.py for what it can be given).
bench: setup
	$(BIN)/python -m bench $(ROW)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck --external-sources .ci/run $$(find bench examples tests tools -name '*.sh')

type: setup
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The site of docs/, into build/site. A broken link, a missing anchor or a page outside of the navigation ends it.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf build *.egg-info megatron_cpt/mixture/order/*.so megatron_cpt/lib runs/quickstart runs/quickstart-chat .pytest_cache .mypy_cache .ruff_cache
