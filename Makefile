# `make demo` and `make test` do everything on a fresh machine with Python 3.10 or newer: they make their own virtual
# environment in .venv, and need no GPU and no model hub.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The compatibility run; `make test-oldest PYTHON_OLDEST=python3.10` runs it with another Python.
PYTHON_OLDEST ?= $(PYTHON)
OLDEST := .venv-oldest

.PHONY: demo test test-oldest test-gpu test-metal lint docs figures clean

demo: $(VENV)/core
	$(BIN)/mlx-lqr demo

# Two processes with a file of tests each, and a core each: BLAS threads of both would only wait for one another.
test: $(VENV)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# What other libraries' changes can break, with the oldest versions that pyproject.toml allows.
test-oldest: $(OLDEST)/test
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2 --dist loadfile $$($(OLDEST)/bin/python tests/oldest.py tests)

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

# The documentation as a site in build/site; a page or a link that is wrong fails it. Nothing is fetched.
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The pictures of README.md, measured anew; by hand, after what the model says has changed.
figures: $(VENV)/core
	$(BIN)/python benchmarks/figures.py

clean:
	rm -rf $(VENV) $(OLDEST) build *.egg-info

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

$(OLDEST)/test: pyproject.toml tests/oldest.py
	$(PYTHON_OLDEST) -m venv $(OLDEST)
	$(OLDEST)/bin/python tests/oldest.py constraints > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --editable '.[torch,test-oldest]' --constraint $(OLDEST)/constraints.txt
	touch $@

$(VENV)/docs: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

$(VENV)/lint: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[lint]'
	touch $@
