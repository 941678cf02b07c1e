# `make run` and `make test` need nothing but Python 3.10 to 3.13 and this folder.

VENV   := .venv
PYTHON := $(VENV)/bin/python

# Settings given on make's command line (`make run PROXY_PORT=9000`) reach the program as
# MLXPROXY_PROXY_PORT; make itself has put the values into the recipe's environment.
GIVEN    := $(foreach o,$(MAKEOVERRIDES),$(if $(findstring =,$(o)),$(firstword $(subst =, ,$(o)))))
SETTINGS  = env -u MAKEFLAGS -u MFLAGS $(foreach n,$(GIVEN),-u $(n)) \
            $(foreach n,$(GIVEN),MLXPROXY_$(n)="$$$(n)")

.DEFAULT_GOAL := help
.PHONY: help run install test lint format bench fuzz soak clean

help: ## List the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

run: $(VENV)/.installed ## Set up and start the proxy; settings as NAME=value
	@$(SETTINGS) $(PYTHON) -m mlxproxy serve

install: $(VENV)/.installed ## Only set up

test: $(VENV)/.dev ## Set up and run all tests
	$(PYTHON) -m pytest tests/unit -n 2
	$(PYTHON) -m pytest --ignore tests/unit -n 2 --dist loadfile

lint: $(VENV)/.dev ## Formatting, lint, types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

format: $(VENV)/.dev ## Format the code
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(VENV)/.bench ## Measure the proxy against nginx and a direct connection
	$(PYTHON) -m benchmarks

fuzz: $(VENV)/.dev ## A thousand generated requests against the real backend
	FUZZ_CASES=1000 $(PYTHON) -m pytest tests/backend/test_fuzz.py

soak: $(VENV)/.dev ## Ten minutes of clients, swaps, kills and disconnects
	$(PYTHON) -m tools.soak

clean: ## Remove what `make` has made (not the instance folder)
	rm -rf $(VENV) *.egg-info build .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@for python in python3 python3.13 python3.12 python3.11 python3.10; do \
	  if $$python -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
	    >/dev/null 2>&1; then echo "Setting up $(VENV) with $$($$python --version)"; \
	    exec $$python -m venv $(VENV); fi; \
	done; \
	echo "mlxproxy needs Python 3.10 to 3.13: install one (on a Mac: brew install python@3.12)"; exit 1

$(VENV)/.installed: setup.cfg pyproject.toml | $(VENV)/bin/python
	@echo "Installing mlxproxy and mlx-lm"
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.bench: $(VENV)/.dev
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	@touch $@

$(VENV)/.dev: setup.cfg pyproject.toml | $(VENV)/bin/python
	@echo "Installing mlxproxy, mlx-lm and what the tests need"
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ $(VENV)/.installed
