# Two commands do everything on a fresh machine: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out
THREADS ?=
# Wheels of every package that the stamp's extras need; a change of pyproject.toml installs again.
STAMP_DEMO := $(VENV)/.installed-demo
STAMP_DEV := $(VENV)/.installed-dev

.PHONY: demo test test-full lint bench clean

demo: $(STAMP_DEMO)
	$(BIN)/fp-export --precision fp32 --output $(OUT)/demo-fp32
	$(BIN)/fp-run $(OUT)/demo-fp32 --output $(OUT)/demo.mp4 --side-by-side --json

test: $(STAMP_DEV)
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-full: $(STAMP_DEV)
	$(BIN)/python -m pytest

lint: $(STAMP_DEV)
	$(BIN)/ruff check .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(STAMP_DEMO): pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e ".[demo]"
	touch $@

$(STAMP_DEV): pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@ $(STAMP_DEMO)

clean:
	rm -rf $(OUT) build .pytest_cache .ruff_cache .hypothesis
