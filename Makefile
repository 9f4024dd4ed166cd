# `make demo` answers a question; `make test` runs the tests. All targets make .venv first.
# PYTHON=python3.12 make demo: another interpreter.  MODEL=... PROMPT=...: another question.

PYTHON ?= python3
MODEL ?= smollm2-135m
PROMPT ?= Why is the sky blue?
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-all lint bench wheel clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	@$(BIN)/headrace run "$(MODEL)" "$(PROMPT)" -n 64

test: $(VENV)/.installed-test $(VENV)/.emulators
	@$(BIN)/python -m pytest -m "not slow"

test-all: $(VENV)/.installed-test $(VENV)/.emulators
	@$(BIN)/python -m pytest

lint: $(VENV)/.installed-test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@rm -rf build/typed && mkdir -p build/typed/headrace
	@ln -s $(addprefix $(CURDIR)/,$(wildcard runtime/*) loaders sparse offload targets) \
	  build/typed/headrace/
	@MYPYPATH=build/typed $(BIN)/mypy -p headrace

bench: $(VENV)/.installed
	@$(BIN)/headrace bench "$(MODEL)"

# A wheel with kernels built ahead: where it is installed, nothing is compiled. Linux on these, and
# riscv64; about a minute for each CPU level.
ARCHITECTURES ?= x86_64 aarch64 armv7a
wheel: $(VENV)/.installed
	@rm -rf targets/packs build/lib  # what was there once would come along
	@for a in $(ARCHITECTURES); do \
	  $(BIN)/headrace targets build --target $$a-linux -o targets/packs/$$a || exit 1; \
	done
	@$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	@ls dist/*.whl

clean:
	rm -rf $(VENV) build dist targets/packs *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	@echo "installing headrace and what it needs ..."
	@$(PIP) --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	@echo "installing what the tests need ..."
	@$(PIP) --editable '.[test]'
	@touch $@ $(VENV)/.installed

# Emulators of other CPUs and a linker for them, where we may install them; tests that lack them are
# skipped and say so.
$(VENV)/.emulators: | $(VENV)/bin/python
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! { \
	    command -v qemu-aarch64 && command -v qemu-system-arm && ls /usr/bin/ld.lld*; } \
	    >/dev/null 2>&1; then \
	  echo "installing emulators ..."; \
	  { apt-get -qq update; \
	    DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends qemu-user \
	      qemu-system-arm; \
	    for linker in lld-22 lld; do \
	      DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $$linker \
	        && break; \
	    done; } >/dev/null 2>&1 || echo "make: emulators cannot be installed"; \
	fi
	@{ command -v ld.lld || ls /usr/bin/ld.lld-*; } >/dev/null 2>&1 || \
	  { echo "installing a linker ..."; $(PIP) ziglang; } || echo "make: no linker can be installed"
	@touch $@

# Debian keeps venv's pip in a package of its own: root gets it installed, others are told how.
$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "make: no $(PYTHON) here; install Python 3.11 or newer, or set PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: headrace needs Python 3.11 or newer, this is $$($(PYTHON) -V);" \
	    "set PYTHON=python3.11 (or newer)" >&2; exit 1; }
	@if ! $(PYTHON) -c 'import ensurepip' 2>/dev/null; then \
	  package=$$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'); \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "installing $$package ..."; \
	    { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y $$package; } \
	      >/dev/null || { echo "make: apt-get install $$package failed" >&2; exit 1; }; \
	  else \
	    echo "make: Python's venv module is missing: sudo apt-get install $$package" >&2; exit 1; \
	  fi; \
	fi
	@echo "making $(VENV) with $$($(PYTHON) -V) ..."
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
