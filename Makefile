# `make demo` and `make test` set everything up on a machine with Python >= 3.10 and make.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: demo test lint slow supported-models clean

demo: $(READY)
	$(BIN)/llm-pruner demo

test: $(READY)
	$(BIN)/python -m pytest

slow: $(READY)
	$(BIN)/python -m pytest -m "slow and not gpu"

# Asks every architecture that transformers knows; some minutes.
supported-models: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python tests/survey.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): requirements.txt pyproject.toml
	@echo "setting up $(VENV) (a few minutes, once)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -r requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -e .
	@touch $@

clean:
	rm -rf $(VENV) prune_log
