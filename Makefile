# `make demo` and `make test` set themselves up on a bare machine: a virtual environment of their own, pinned by
# constraints.txt. Everything else assumes that environment.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

.PHONY: demo test test-cpu test-interpret test-gpu bench bench-sweep bench-search bench-streaming bench-grouped bench-activations bench-offload bench-calibrate bench-calibrate-block bench-calibrate-large bench-check bench-cpu instructions lint tables clean

demo: $(STAMP)
	$(BIN)/tritonq demo

test: lint test-cpu test-interpret

test-cpu: $(STAMP)
	$(BIN)/python -m pytest -m "not gpu" -n 2

# The kernels themselves, in Triton's interpreter, which has to be chosen before they are defined.
test-interpret: $(STAMP)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m "not gpu" -n 2 tests/test_laws.py tests/test_codecs.py \
		tests/test_tuning.py tests/test_tune.py tests/test_search.py tests/test_super_groups.py tests/test_both.py tests/test_ste.py tests/test_bulk.py

# On a machine with a GPU: with the interpreter of the environment that holds torch, `make test-gpu BIN=$$(dirname $$(which python3))`.
test-gpu:
	PYTHONPATH=. $(BIN)/python -m pytest -m gpu

bench:
	PYTHONPATH=. $(BIN)/python -m bench.kernels

# 64 KiB to 2 GiB.
bench-sweep:
	PYTHONPATH=. $(BIN)/python -m bench.kernels --sizes

# Scale search beside the eager one.
bench-search:
	PYTHONPATH=. $(BIN)/python -m bench.search

# Tensors in host memory through a GPU, beside copies of pinned memory.
bench-streaming:
	PYTHONPATH=. $(BIN)/python -m bench.streaming

# 64 experts in one call, beside single calls and a copy.
bench-grouped:
	PYTHONPATH=. $(BIN)/python -m bench.grouped

# Offloaded weights beside pinned copies, computing alone, and diffusers where it is installed.
bench-offload:
	PYTHONPATH=. $(BIN)/python -m bench.offload

# Training steps with saved activations in host memory, beside torch's save_on_cpu.
bench-activations:
	PYTHONPATH=. $(BIN)/python -m bench.activations

# Every calibration method on two small models beside rounding to nearest; weights are found or downloaded.
bench-calibrate:
	PYTHONPATH=. $(BIN)/python -m bench.calibrate

# SignRound of one large block beside auto-round, where that is installed.
bench-calibrate-block:
	PYTHONPATH=. $(BIN)/python -m bench.calibrate_block

# Memory of calibrating a 70B model from file to file; 24 GB of disk.
bench-calibrate-large:
	PYTHONPATH=. $(BIN)/python -m bench.calibrate_large

# Exit code 1 if anything got slower than a committed file: `make bench-check RESULTS=bench/results/<gpu>/kernels.json`.
bench-check:
	PYTHONPATH=. $(BIN)/python -m bench.kernels --peers none --check $(RESULTS)

bench-cpu: $(STAMP)
	PYTHONPATH=. $(BIN)/python -m bench.cpu

# Instructions of every kernel as compiled for sm_90; needs no GPU. Counts of the table in docs/speed.md are of Triton 3.6.
instructions: $(STAMP)
	PYTHONPATH=. $(BIN)/python -m bench.instructions

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The tables of README.md and docs/speed.md, and docs/hosts.md, which tests compare.
tables: $(STAMP)
	$(BIN)/python -m tests.test_readme
	$(BIN)/python -m tests.hosts.page

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,demo]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) demo-output
