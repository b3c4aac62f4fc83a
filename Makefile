# `make demo` and `make test` do everything on a fresh machine with Python 3.10 or newer: they make their own virtual
# environment in .venv, and need no GPU and no model hub. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The compatibility run; `make test-oldest PYTHON_OLDEST=python3.10` runs it with another Python.
PYTHON_OLDEST ?= $(PYTHON)
OLDEST := .venv-oldest

.PHONY: help demo test test-arm test-docs test-families test-oldest test-gpu test-llama test-metal test-wheel fuzz lint docs \
	figures families clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1#\2/p' $(MAKEFILE_LIST) | column -t -s '#'

demo: $(VENV)/core ## fit a controller on a small model, and write with it
	$(BIN)/mlx-lqr demo

# Two processes with a file of tests each, and a core each: BLAS threads of both would only wait for one another. With
# COVERAGE=1 it also prints what they cover: a quarter slower with Python 3.11 and older, newer ones count lines at next
# to no cost.
test: $(VENV)/test ## all tests but test-docs and test-families; COVERAGE=1 prints which files they cover least
	COVERAGE_CORE=$$($(BIN)/python -c 'import sys; print("sysmon" if sys.version_info >= (3, 12) else "ctrace")') \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --ignore tests/families \
		--ignore tests/test_documentation.py \
		$(if $(COVERAGE),--cov --cov-report=)
	@[ -z "$(COVERAGE)" ] || $(BIN)/python -m coverage report | sed -n -e '1,14p' -e '$$p'

# Every command of README.md and docs/ is run, in one process, which takes minutes.
test-docs: $(VENV)/test ## the documentation: its commands do what it shows
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_documentation.py

# Models that are on no list, a tiny one of each architecture among them; one process a core.
test-families: $(VENV)/test ## the rest of the tests: every architecture, several processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/families -n logical --dist worksteal

# Damaged files of every kind, from a seed: `make fuzz SEED=7 COUNT=20000`; without SEED others each time.
COUNT ?= 20000
fuzz: $(VENV)/test ## damaged files of every kind; SEED and COUNT of them
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m fuzz --count $(COUNT) $(if $(SEED),--seed $(SEED))

# What other libraries' changes can break, with the oldest versions that pyproject.toml allows.
test-oldest: $(OLDEST)/test ## what other libraries can change, with their oldest versions
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2 --dist loadfile $$($(OLDEST)/bin/python tests/oldest.py tests)

# On a machine with a CUDA GPU: the tests that need one, then what the backend does there, measured.
test-gpu: $(VENV)/test ## on a machine with a CUDA GPU: its tests, and a benchmark
	$(BIN)/python -m pytest -m gpu -rs
	$(BIN)/python benchmarks/backends.py --device cuda

# The tests of the llama.cpp backend, which the others' environment lacks: building it takes minutes.
# Then those of the engine once more, with weights and streams in the memory of a device.
test-llama: $(VENV)/llama ## the tests that need llama.cpp, which it builds
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/backends/test_borrowed.py tests/backends/test_llama*.py \
		tests/commands/test_llama*.py tests/runtime/test_edge.py tests/sharing/test_llama_cpp.py
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m pytest -p helpers.device_memory tests/backends/test_llama*.py

# On an x86-64 Debian machine; root installs the emulator and the compiler there. What takes long is kept in build/arm.
test-arm: $(VENV)/llama ## on x86-64 Debian: the light runtime on 64-bit ARM, emulated
	$(BIN)/python tests/emulated_arm.py

# On a Mac: the tests, then decoding, start-up and synthesis as one table to paste into an issue.
test-metal: $(VENV)/test ## on a Mac: all tests, and a benchmark
	$(BIN)/python benchmarks/metal.py

# Needs no environment of ours: it makes one, as somebody does who installs the package.
test-wheel: $(BIN)/python ## build the wheel, install it into a fresh environment, run its commands
	$(BIN)/python tests/built_wheel.py

# The types of tests are those of what tests use.
lint: $(VENV)/lint $(VENV)/test ## style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/typecheck.py
	$(BIN)/python tests/text_files.py

# A page or a link that is wrong fails it. Nothing is fetched.
docs: $(VENV)/docs ## the documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

figures: $(VENV)/core ## the pictures of the README, measured again
	$(BIN)/python benchmarks/figures.py

families: $(VENV)/core ## the page of architectures, measured again
	$(BIN)/python benchmarks/families.py --markdown docs/families.md

clean: ## remove environments and builds
	rm -rf $(VENV) $(OLDEST) build *.egg-info .coverage

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

# With the device of tests/helpers/device_memory.py, which a wheel that pip has kept may lack.
$(VENV)/llama: $(VENV)/test
	CMAKE_ARGS=-DGGML_RPC=ON $(BIN)/python -m pip install --quiet --no-cache-dir --editable '.[test,llama]'
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
