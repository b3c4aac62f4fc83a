# `make demo` and `make test` do everything on a fresh machine with Python 3.10 or newer: they make their own virtual
# environment in .venv, and need no GPU and no model hub.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-gpu test-metal lint clean

demo: $(VENV)/core
	$(BIN)/mlx-lqr demo

# Two processes with a file of tests each, and a core each: BLAS threads of both would only wait for one another.
test: $(VENV)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# On a machine with a CUDA GPU: the tests that need one, then what the backend does there, measured.
test-gpu: $(VENV)/test
	$(BIN)/python -m pytest -m gpu -rs
	$(BIN)/python benchmarks/backends.py --device cuda

# On a Mac: the tests, then decoding, start-up and synthesis as one table to paste into an issue.
test-metal: $(VENV)/test
	$(BIN)/python benchmarks/metal.py

lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/typecheck.py

clean:
	rm -rf $(VENV) build *.egg-info

# One stamp for each set of requirements; a changed pyproject.toml installs again.
$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/core: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/test: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

$(VENV)/lint: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[lint]'
	touch $@
