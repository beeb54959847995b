# `make demo` and `make test` set everything up by themselves.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Ultralytics would install packages and ask the network for updates while it runs
export YOLO_AUTOINSTALL = False
export YOLO_OFFLINE = True

.PHONY: demo test lint types setup clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip setuptools
	$(BIN)/python -m pip install -q -e ".[dev]"
	touch $@

demo: setup
	$(BIN)/python benchmarks/demo.py

test: setup lint types
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# The type check reads an installed wheel: it does not follow the mapping of cfg/ and export/ in an editable install
types: setup
	$(BIN)/python .ci/typecheck.py

clean:
	rm -rf $(VENV) build dist *.egg-info runs
