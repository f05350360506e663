# Two commands matter: `make train` and `make test`. Both make the virtual environment if it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
GPU_PYTHON ?= $(BIN)/python
GPU_INSTALLED = $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(VENV)/installed-dev)
WITHIN := PYTHONPATH=$(CURDIR) timeout
SOURCES := kernels offload trainer launch benchmarks tests

.PHONY: train test test-long faults lint types bench bench-transfer gpu gpu-training clean

train: $(VENV)/installed
	$(BIN)/interlace train quickstart

# One thread per process: threads of several processes that share cores spin against each other.
test: lint types
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile

# What make test runs in fewer ways, and whole quickstarts: an hour more.
test-long: $(VENV)/installed-dev
	$(BIN)/pytest -m long

# All of tests/faults, quick ones included, and what tests elsewhere alone show of the plan: half an
# hour on two cores, two files at a time. What recovering took is written into docs/reliability.md.
faults: $(VENV)/installed-dev
	elsewhere="$$($(BIN)/python tests/faults/harness/plan_map.py elsewhere)" && \
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/faults $$elsewhere -m "not gpu" -n 2 --dist loadfile --write-table

lint: $(VENV)/installed-dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: $(VENV)/installed-dev
	$(BIN)/pyright

bench: $(VENV)/installed-dev
	$(BIN)/python benchmarks/versus_bare_loop.py
	$(BIN)/python benchmarks/cpu_update.py
	$(BIN)/python benchmarks/offload.py
	$(BIN)/python benchmarks/versus_deepspeed.py
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/ssd.py
	$(BIN)/python benchmarks/step_ops.py
	$(BIN)/python benchmarks/recall.py

# muP and update rules: an hour of one core, less on several.
bench-transfer: $(VENV)/installed-dev
	$(BIN)/python benchmarks/coordinate_check.py
	$(BIN)/python benchmarks/transfer.py
	$(BIN)/python benchmarks/optimizers.py

# Kernels, in nine minutes: each part has the seconds in front of it, and none stops the others.
# Where the packages are there already:  make gpu GPU_PYTHON=python3
gpu: $(GPU_INSTALLED)
	failed=0; \
	$(WITHIN) 230 $(GPU_PYTHON) -m pytest -m gpu || failed=1; \
	$(WITHIN) 160 $(GPU_PYTHON) benchmarks/attention.py --budget 120 --save || failed=1; \
	$(WITHIN) 50 $(GPU_PYTHON) benchmarks/ssd.py --save || failed=1; \
	$(WITHIN) 30 $(GPU_PYTHON) benchmarks/gpu_update.py --save || failed=1; \
	$(WITHIN) 60 $(GPU_PYTHON) benchmarks/step_ops.py --save || failed=1; \
	exit $$failed

# Training on a GPU: offloading, the race against DeepSpeed (nine minutes), and the whole loop beside
# a bare one.
gpu-training: $(GPU_INSTALLED)
	PYTHONPATH=$(CURDIR) $(GPU_PYTHON) benchmarks/offload.py --save
	PYTHONPATH=$(CURDIR) $(GPU_PYTHON) benchmarks/versus_deepspeed.py --save
	PYTHONPATH=$(CURDIR) $(GPU_PYTHON) benchmarks/cpu_update.py --save
	PYTHONPATH=$(CURDIR) $(GPU_PYTHON) benchmarks/versus_bare_loop.py

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'interlace needs Python 3.11 or newer; try  make PYTHON=python3.12')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install --quiet --editable ".[dev]"
	$(BIN)/pip install --quiet --no-deps "mup==1.0.0"
	touch $@

clean:
	rm -rf $(VENV) *.egg-info
