# make demo   DreamBooth on a miniature model and this machine's CPU, from a bare clone: about 2 minutes and installing
# make test   lint, types and the fast tests, with the same inputs every time
# make test-slow   the tests that take minutes, and new inputs for those that make up their own

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: demo test test-slow

demo: $(INSTALLED)
	$(BIN)/lowvram-db train configs/demo.toml
	$(BIN)/lowvram-db train configs/demo.toml --set prior.enabled=false --set output.name=demo-without-prior
	$(BIN)/python -m lowvram_db.demo runs/demo runs/demo-without-prior

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses auto --maxprocesses 4

test-slow: $(INSTALLED)
	$(BIN)/pytest -m "slow or hypothesis" --hypothesis-profile explore

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
