# make demo   train in miniature on this machine's CPU, from a bare clone
# make test   lint, types and the fast tests
# make test-slow   the tests that take minutes

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: demo test test-slow

# One thread: on tensors as tiny as the miniature's a second one only waits.
demo: $(INSTALLED)
	$(BIN)/python -m lowvram_db.demo runs/miniature
	OMP_NUM_THREADS=1 $(BIN)/lowvram-db train configs/demo.toml

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses auto --maxprocesses 4

test-slow: $(INSTALLED)
	$(BIN)/pytest -m slow

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
