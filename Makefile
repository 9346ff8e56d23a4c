# Two commands do everything on a fresh machine: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out
# An index of torch wheels without CUDA, see README.md.
TORCH_INDEX ?=
# Stamps of what is installed; a change of pyproject.toml or of the C++ sources installs again.
STAMP_DEMO := $(VENV)/.installed-demo
STAMP_DEV := $(VENV)/.installed-dev
BUILT_FROM := pyproject.toml $(shell find cpp_ext -name '*.cpp' -o -name '*.h' -o -name 'CMakeLists.txt')

.PHONY: demo test test-full lint sanitize clean

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
	if [ -n "$(TORCH_INDEX)" ]; then $(BIN)/python -m pip install --quiet torch==2.13.0 --index-url $(TORCH_INDEX); fi

$(STAMP_DEMO): $(BUILT_FROM) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e ".[demo]"
	touch $@

$(STAMP_DEV): $(BUILT_FROM) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@ $(STAMP_DEMO)

# The C++ kernels under AddressSanitizer, UBSan and ThreadSanitizer.
sanitize:
	@if command -v $${CXX:-c++} >/dev/null; then bash cpp_ext/sanitize.sh; else echo "sanitize: no C++ compiler, skipped"; fi

clean:
	rm -rf $(OUT) build .pytest_cache .ruff_cache .hypothesis
