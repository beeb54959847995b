# `make demo` and `make test` set everything up by themselves.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Tests that run side by side; a test uses one core and up to 2 GB
WORKERS ?= 2
# Ultralytics would install packages and ask the network for updates while it runs
export YOLO_AUTOINSTALL = False
export YOLO_OFFLINE = True

.PHONY: demo test lint types setup setup-browser clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip setuptools
	$(BIN)/python -m pip install -q -e ".[dev]"
	touch $@

# The benchmark's page is tested in a real browser; it is installed where that needs no password. Without one its tests
# are skipped, and in CI they fail.
setup-browser:
	@if command -v chromium && command -v chromedriver; then exit 0; fi >/dev/null; \
	sudo=; [ "$$(id -u)" = 0 ] || sudo="sudo -n"; \
	if command -v apt-get >/dev/null && $$sudo true 2>/dev/null; then \
		$$sudo apt-get update -qq && \
		$$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -qqy --no-install-recommends \
			chromium chromium-driver fonts-liberation >/dev/null; \
	fi || true; \
	command -v chromedriver >/dev/null || echo "no chromium with chromedriver: the page is not tested in a browser"

demo: setup
	$(BIN)/python benchmarks/demo.py

test: setup setup-browser lint types
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadscope

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# The type check reads an installed wheel: it does not follow the mapping of cfg/ and export/ in an editable install
types: setup
	$(BIN)/python .ci/typecheck.py

clean:
	rm -rf $(VENV) build dist *.egg-info runs
