# Two commands do everything on a fresh machine: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out
BENCH ?= docs/bench
# Of `make pareto`. Clips long enough for a full window.
PARETO_PRECISIONS ?= fp32 int8
PARETO_WAYS := steps solver window commit cache-0.7 cache-1 guidance guidance-steps
PARETO_CLIPS ?= --identities 8 --frames 29
PARETO_RUN ?=
# Where torch comes from. Without an NVIDIA GPU: wheels without CUDA, gigabytes smaller; if that index cannot be reached, or
# TORCH_INDEX is empty, the usual one.
TORCH_INDEX ?= $(shell command -v nvidia-smi >/dev/null 2>&1 || echo https://download.pytorch.org/whl/cpu)
# Stamps of what is installed; a change of pyproject.toml or of the C++ sources installs again.
STAMP_VENV := $(VENV)/.made
STAMP_TORCH := $(VENV)/.installed-torch
STAMP_DEMO := $(VENV)/.installed-demo
STAMP_DEV := $(VENV)/.installed-dev
TORCH := $(shell sed -n 's/.*"\(torch==[0-9.]*\)".*/\1/p' pyproject.toml)
BUILT_FROM := pyproject.toml $(shell find cpp_ext -name '*.cpp' -o -name '*.h' -o -name 'CMakeLists.txt')

.PHONY: demo bench bench-smallest pareto test test-full lint sanitize clean

demo: $(STAMP_DEMO)
	$(BIN)/fp-export --precision fp32 --output $(OUT)/demo-fp32
	$(BIN)/fp-run $(OUT)/demo-fp32 --output $(OUT)/demo.mp4 --side-by-side --json

# Times the demo beside its peers, minutes long on a quiet machine. $(BENCH) holds the sample that is committed.
bench: $(STAMP_DEV)
	$(BIN)/fp-bench run --cases demo demo-int8 --output $(BENCH)
	$(BIN)/fp-bench report $(BENCH)

# The whole command in seconds, so that it cannot rot; its figures mean nothing.
bench-smallest: $(STAMP_DEV)
	$(BIN)/fp-bench run --cases smallest --quick --output $(OUT)/bench-smallest
	$(BIN)/fp-bench report $(OUT)/bench-smallest

# Quality beside speed over precision, steps, window and the approximations: $(OUT)/pareto/pareto.html.
# PARETO_PRECISIONS="fp32 fp16 int8" for more.
pareto: $(STAMP_DEV)
	set -e; for precision in $(PARETO_PRECISIONS); do \
		bundle=$(OUT)/demo-$$precision; report=$(OUT)/pareto/$$precision; \
		$(BIN)/fp-export --precision $$precision --output $$bundle; \
		$(BIN)/fp-bench run $$bundle --cases pareto $(PARETO_RUN) --output $$report-latency; \
		$(BIN)/fp-bench quality $$bundle --steps 1,2,4,8 $(PARETO_CLIPS) --self-only --output $$report-steps; \
		$(BIN)/fp-bench quality $$bundle --steps 4 --solver unipc $(PARETO_CLIPS) --self-only --output $$report-solver; \
		$(BIN)/fp-bench quality $$bundle --steps 2 --window 3 $(PARETO_CLIPS) --self-only --output $$report-window; \
		$(BIN)/fp-bench quality $$bundle --steps 2 --commit last-step $(PARETO_CLIPS) --self-only --output $$report-commit; \
		$(BIN)/fp-bench quality $$bundle --steps 4 --step-cache 0.7 $(PARETO_CLIPS) --self-only --output $$report-cache-0.7; \
		$(BIN)/fp-bench quality $$bundle --steps 4 --step-cache 1 $(PARETO_CLIPS) --self-only --output $$report-cache-1; \
		$(BIN)/fp-bench quality $$bundle --steps 2 --guidance 1.5 $(PARETO_CLIPS) --self-only --output $$report-guidance; \
		$(BIN)/fp-bench quality $$bundle --steps 2 --guidance 1.5 --guidance-steps 1 $(PARETO_CLIPS) --self-only \
			--output $$report-guidance-steps; \
	done
	$(BIN)/fp-bench pareto --output $(OUT)/pareto/pareto.html \
		--latency $(addsuffix -latency,$(addprefix $(OUT)/pareto/,$(PARETO_PRECISIONS))) \
		--quality $(foreach precision,$(PARETO_PRECISIONS),$(addprefix $(OUT)/pareto/$(precision)-,$(PARETO_WAYS)))

test: $(STAMP_DEV)
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-full: $(STAMP_DEV)
	$(BIN)/python -m pytest

lint: $(STAMP_DEV)
	$(BIN)/ruff check .

# A stamp written last: what a failed run left behind is completed by the next one, not trusted.
$(STAMP_VENV):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV) || { echo "python3 -m venv failed; on Debian: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

$(STAMP_TORCH): $(STAMP_VENV) pyproject.toml
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install --quiet --retries 1 --timeout 15 --index-url $(TORCH_INDEX) "$(TORCH)" || ) \
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	touch $@

$(STAMP_DEMO): $(STAMP_TORCH) $(BUILT_FROM)
	$(BIN)/python -m pip install --quiet -e ".[export,mesh]"
	touch $@

$(STAMP_DEV): $(STAMP_TORCH) $(BUILT_FROM)
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@ $(STAMP_DEMO)

# The C++ kernels under AddressSanitizer, UBSan and ThreadSanitizer.
sanitize: $(STAMP_DEV)
	@if command -v $${CXX:-c++} >/dev/null; then PATH="$(abspath $(BIN)):$$PATH" bash cpp_ext/sanitize.sh; \
	else echo "sanitize: no C++ compiler, skipped"; fi

clean:
	rm -rf $(OUT) build .pytest_cache .ruff_cache .hypothesis
