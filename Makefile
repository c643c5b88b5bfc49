# Needs git, make, Python >= 3.11 with venv, and the package registry. `make help` lists the targets.
PYTHON ?= python3
VENV   ?= .venv
# Which torch is installed first; everything else keeps it. A CUDA build: make demo TORCH="torch --index-url https://…"
TORCH  ?= -c constraints.txt torch
# Test processes side by side, one thread each.
JOBS   ?= $(shell n=$$(nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2); [ $$n -gt 8 ] && n=8; echo $$n)

BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
DEPS   := pyproject.toml constraints.txt
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: help demo test check lint fast-tests soak parity-latest wheel-check tiny bench clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | column -t -s '|'

demo: $(VENV)/.base ## install, run the main job on bundled pictures, write PNGs to ./demo/
	$(BIN)/python examples/demo.py demo

test: $(VENV)/.test ## install with the test extra, run the whole CPU suite
	$(PYTEST) -n $(JOBS) --dist worksteal

check: lint fast-tests ## format, lint, types, import floors, fast tests

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) tests/unit/test_floors.py

fast-tests: $(VENV)/.dev
	$(PYTEST) -n $(JOBS) --dist worksteal -m "not slow and not soak" tests/unit tests/properties

soak: $(VENV)/.test ## long randomised runs: other examples each time, many more of them
	HYPOTHESIS_PROFILE=soak $(PYTEST) -n $(JOBS) -m "soak or not slow" tests/properties tests/unit tests/e2e

parity-latest: $(VENV)-latest/.done ## the parity tests against the newest transformers instead of the pinned one
	OMP_NUM_THREADS=1 $(VENV)-latest/bin/python -m pytest -n $(JOBS) tests/parity

wheel-check: ## build the wheel, install it with all its dependencies in an empty venv elsewhere, run it there
	PYTHON="$(PYTHON)" .ci/wheel-check

tiny: $(VENV)/.base ## retrain the embedded model `tiny` (hours on a CPU; goes on where it stopped)
	$(BIN)/python -m paligemma.recipes.tiny

bench: $(VENV)/.test ## time this machine beside transformers; minutes, and memory for the true 3B shape
	$(BIN)/python benchmarks/cpu_inference.py

clean: ## remove environments and build outputs
	rm -rf $(VENV) $(VENV)-latest build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

# Each stamp is one set of extras in the same environment; it is older than pyproject.toml when that changed.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else \
	  f"Python {v.major}.{v.minor} is too old: 3.11 or newer is needed. make PYTHON=python3.12 …")'
	@echo "Installing into $(VENV)/: a minute or two, torch first."
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(TORCH)
	@touch $@

$(VENV)/.base: $(VENV)/.torch $(DEPS)
	$(PIP) install --quiet -e .
	@touch $@

$(VENV)/.test: $(VENV)/.torch $(DEPS)
	$(PIP) install --quiet -e '.[test]'
	@touch $@ $(VENV)/.base

$(VENV)/.dev: $(VENV)/.torch $(DEPS)
	$(PIP) install --quiet -e '.[dev]'
	@touch $@ $(VENV)/.base $(VENV)/.test

$(VENV)-latest/.done: $(DEPS)
	$(PYTHON) -m venv $(VENV)-latest
	$(VENV)-latest/bin/python -m pip --disable-pip-version-check install --quiet $(TORCH)
	$(VENV)-latest/bin/python -m pip --disable-pip-version-check install --quiet -e '.[test]'
	$(VENV)-latest/bin/python -m pip --disable-pip-version-check install --quiet --upgrade transformers peft
	@touch $@
