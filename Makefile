# `make demo` and `make test` set up everything they need in .venv, each by itself.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test lint bench clean

demo: $(STAMP)
	$(BIN)/forktree demo

test: $(STAMP) lint
	$(BIN)/pytest -q

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python bench/decode.py

# Without a GPU the small CPU build of torch is installed first: a plain `torch` would bring gigabytes of CUDA.
$(STAMP): pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("forktree needs Python 3.11 or newer, got " + sys.version)'
	@if ! $(PYTHON) -c 'import venv, ensurepip' 2>/dev/null; then \
		echo "installing python3-venv"; apt-get update -q && apt-get install -yq python3-venv; fi
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	@command -v nvidia-smi >/dev/null 2>&1 && $(BIN)/pip install -q "torch>=2.11" || $(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info python/*.egg-info
