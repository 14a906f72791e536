# Two commands for a newcomer: `make demo` and `make test`. Both need Python 3.11-3.13, gcc and make, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PORT ?= 8000
DEMO_FLAGS := --port $(PORT) $(if $(ONCE),--once) $(if $(JSON),--json $(JSON))

.PHONY: demo test lint unit sanitize clean

demo: $(VENV)/.demo-installed
	$(BIN)/flyray demo $(DEMO_FLAGS)

test: lint unit

lint: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

unit: $(VENV)/.test-installed
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

# The kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer; about two minutes, and no part of `test`.
sanitize: $(VENV)/.test-installed
	$(BIN)/python tests/sanitize.py

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else \
		f"flyray needs Python 3.11, 3.12 or 3.13; {sys.executable} is {v[0]}.{v[1]}. Name another: make demo PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# The C++ kernels are built by this install; it runs again when they or the dependencies change.
SOURCES := pyproject.toml $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h kernels/cpu/*.inc)

$(VENV)/.demo-installed: $(SOURCES) | $(VENV)/bin/python
	$(BIN)/python -m pip install -qq --editable '.[quantize]'
	@touch $@

$(VENV)/.test-installed: $(SOURCES) | $(VENV)/bin/python
	$(BIN)/python -m pip install -qq --editable '.[test]'
	@touch $@ $(VENV)/.demo-installed

clean:
	rm -rf $(VENV) build *.egg-info kernels/cpu/*.so .demo
