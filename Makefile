# Everything sets itself up: on a fresh machine with Python 3.11 or newer, `make demo` or `make test` is all there is to type.
# PYTHON=python3.12 make ... picks another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
# The lowest torch is not in constraints-lowest.txt: wheels of older releases come with gigabytes of CUDA libraries on Linux
# unless an index of CPU builds is given. `make test-lowest LOWEST_TORCH=torch==2.6.0` takes the oldest one.
LOWEST_TORCH ?= torch==2.13.0
PYTEST_FLAGS ?=
# Tests run in so many processes, each with one thread.
JOBS ?= 2

.PHONY: demo test test-slow test-lowest benchmark sanitize lint format constraints clean
.DELETE_ON_ERROR:

demo: $(RUN_STAMP)
	$(BIN)/hf-sparse demo --overwrite

test: $(RUN_STAMP)
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow" --session-timeout=840 $(PYTEST_FLAGS)

# pytest exits with 5 when no test is marked slow; that is no failure.
test-slow: $(RUN_STAMP)
	$(BIN)/python -m pytest -n $(JOBS) -m slow --timeout=1800 $(PYTEST_FLAGS) || [ $$? -eq 5 ]

benchmark: $(RUN_STAMP)
	$(BIN)/python tests/benchmarks/pruning.py

# The native kernels under the address and undefined behaviour sanitizers; gcc and cmake have to be there.
sanitize: $(RUN_STAMP)
	$(BIN)/python -m pip install nanobind
	PYTHON=$(BIN)/python tests/native/sanitize.sh

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV_STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-lowest: .venv-lowest/.installed
	.venv-lowest/bin/python -m pytest -m "not slow" $(PYTEST_FLAGS)

# Writes constraints.txt anew: the newest versions that pyproject.toml allows, as one fresh environment resolves them.
# torch is given first and by version, so that the choice of its build stays with whoever installs it.
constraints:
	rm -rf .venv-constraints
	$(PYTHON) -m venv .venv-constraints
	.venv-constraints/bin/python -m pip install torch==2.13.0
	.venv-constraints/bin/python -m pip install '.[tests,plots,evaluation,integrations,dev]'
	{ echo "# The exact set that is tested; made by \`make constraints\`."; \
	  .venv-constraints/bin/python -m pip freeze --exclude hf-sparse --exclude setuptools | sed 's/+cpu$$//'; } > constraints.txt
	rm -rf .venv-constraints

clean:
	rm -rf .venv .venv-lowest .venv-constraints build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one with PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(RUN_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e '.[tests,plots,integrations,evaluation]'
	touch $@

$(DEV_STAMP): $(RUN_STAMP)
	$(BIN)/python -m pip install -c constraints.txt -e '.[tests,plots,integrations,evaluation,dev]'
	touch $@

.venv-lowest/.installed: pyproject.toml constraints-lowest.txt
	rm -rf .venv-lowest
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install -c constraints-lowest.txt '$(LOWEST_TORCH)'
	.venv-lowest/bin/python -m pip install -c constraints-lowest.txt -e '.[tests,plots]'
	touch $@
