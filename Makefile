# Every target sets up what it needs in .venv, from pyproject.toml and constraints.txt, and only when these changed.
#   PYTHON=python3.12      the interpreter that .venv is made with (3.11 or newer)
#   TORCH_INDEX=<url>      a package index to take torch from, and torch only: a CPU or another CUDA build
#                          (the index of such wheels is named on PyTorch's installation page)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
TORCH_INDEX ?=

VENV := .venv
PY := $(VENV)/bin/python
RUN_STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
LOG := $(VENV)/pip.log

.PHONY: help demo table gallery test lint docs ladder clean

help: ## list the targets
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 16
	@sed -nE '2,/^$$/s/^#   /  /p' Makefile

demo: $(RUN_STAMP) ## the main job on real text, then the trade-off against dense and magnitude
	$(PY) -m sparsebench method=wanda sparsity=0.5
	$(PY) -m sparsebench.demo

table: $(RUN_STAMP) ## the table of the README
	$(PY) -m sparsebench.demo table

gallery: $(RUN_STAMP) ## small sweeps, their reports, and a page that leads to all
	$(PY) -m sparsebench.reports.gallery

test: $(DEV_STAMP) ## the whole test suite
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile

lint: $(DEV_STAMP) ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy --strict sparsebench

docs: $(RUN_STAMP) ## make docs/reference.md from the declarations
	$(PY) -m sparsebench.docs > docs/reference.md

ladder: $(RUN_STAMP) ## train the tiny models (hours; stop and start it as you like)
	$(PY) -m sparsebench.models.ladder

clean: ## remove .venv and caches; results and trained models stay
	rm -rf $(VENV) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call install,<what to install>): what pip says goes to a log; every 15 s one line tells how far it is.
define install
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "sparsebench needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	@$(PY) -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing the pinned dependencies into $(VENV) (a few minutes the first time; log: $(LOG))"
	@set -e; : >$(LOG); \
	( while sleep 15 >/dev/null 2>&1; do echo "  $$(grep -c '^Collecting' $(LOG)) packages collected$$(grep -qs '^Installing' $(LOG) && echo , installing them)"; done ) & \
	heartbeat=$$!; trap 'kill $$heartbeat' EXIT; \
	pip() { $(PY) -m pip install --disable-pip-version-check --progress-bar off "$$@" >>$(LOG) 2>&1 \
		|| { grep '^ERROR' $(LOG) || tail -n 20 $(LOG); exit 1; } >&2; }; \
	if [ -n "$(TORCH_INDEX)" ]; then pip --no-deps --index-url "$(TORCH_INDEX)" "$$(grep '^torch==' constraints.txt)"; fi; \
	pip --constraint constraints.txt --editable $(1)
endef

$(RUN_STAMP): pyproject.toml constraints.txt
	$(call install,.)
	@touch $(RUN_STAMP)

$(DEV_STAMP): pyproject.toml constraints.txt
	$(call install,'.[dev]')
	@touch $(RUN_STAMP) $(DEV_STAMP)
