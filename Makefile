# Each command makes its virtual environment, and installs what is missing or has changed.
#
#   make demo    fine-tune the embedded base model on pictures of one subject, and show what changed
#   make test    lint, types and tests
#
# PYTHON=python3.12 chooses another Python (3.11 or newer), JOBS=8 another number of test processes.

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# One thread per process: two processes of one thread each are faster than the other way round, and repeatable.
test: export OMP_NUM_THREADS = 1
test: export HF_HUB_OFFLINE = 1
test: export TOKENIZERS_PARALLELISM = false
demo: export OMP_NUM_THREADS = 1
demo: export HF_HUB_OFFLINE = 1
demo: export TRANSFORMERS_VERBOSITY = error

.PHONY: demo test lint format install dev clean

demo: install
	$(BIN)/python -m examples.demo

test: lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadscope --max-worker-restart=0 $(ARGS)

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(VENV)/.installed
dev: $(VENV)/.installed-dev

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch first and alone: with its version fixed, a small build for CPUs is taken wherever pip is told of one.
$(VENV)/.installed: $(VENV)/.python pyproject.toml constraints.txt
	$(PIP) install -q torch -c constraints.txt
	$(PIP) install -q -e . -c constraints.txt
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install -q -e '.[dev]' -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
