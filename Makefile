# `make run` and `make test` need nothing but Python 3.10 or later and this folder.

# The virtual environment is made with the first suitable Python of PYTHONS. `make test
# PYTHON=python3.12` uses that one instead, in an environment of its own (.venv-python3.12), so that
# several can be tested side by side.
PYTHONS := python3 python3.14 python3.13 python3.12 python3.11 python3.15 python3.10
VENV    := .venv
ifeq ($(origin PYTHON),command line)
PYTHONS := $(PYTHON)
VENV    := .venv-$(notdir $(PYTHON))
endif
IN_VENV := $(VENV)/bin/python
PIP      = $(IN_VENV) -m pip install --disable-pip-version-check

# Settings given on make's command line (`make run PROXY_PORT=9000`) reach the program as
# MLXPROXY_PROXY_PORT; make itself has put the values into the recipe's environment.
GIVEN    := $(filter-out PYTHON PYTHONS VENV,$(foreach o,$(MAKEOVERRIDES),\
            $(if $(findstring =,$(o)),$(firstword $(subst =, ,$(o))))))
SETTINGS  = env -u MAKEFLAGS -u MFLAGS $(foreach n,$(GIVEN),-u $(n)) \
            $(foreach n,$(GIVEN),MLXPROXY_$(n)="$$$(n)")

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run install install-vision test lint format bench fuzz soak clients reference clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

run: $(VENV)/.installed ## Set up and start the proxy; settings as NAME=value
	@$(SETTINGS) $(IN_VENV) -m mlxproxy serve

install: $(VENV)/.installed ## Only set up

install-vision: $(VENV)/.vision ## Add mlx-vlm, for models that see, embed or rank (about 500 MB)

test: $(VENV)/.dev ## Set up and run all tests
	$(IN_VENV) -m pytest tests/unit -n 2
	$(IN_VENV) -m pytest --ignore tests/unit -n 2 --dist loadfile

lint: $(VENV)/.dev ## Formatting, lint, types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

format: $(VENV)/.dev ## Format the code
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(VENV)/.bench ## Measure the proxy against nginx and a direct connection
	$(IN_VENV) -m benchmarks

fuzz: $(VENV)/.dev ## Generated requests and schemas against the real backend
	FUZZ_CASES=1000 $(IN_VENV) -m pytest tests/backend/test_fuzz.py
	FUZZ_SCHEMAS=500 FUZZ_DEMO=1 $(IN_VENV) -m pytest -s tests/backend/test_schemas.py

soak: $(VENV)/.dev ## Ten minutes of clients, swaps, kills and disconnects
	$(IN_VENV) -m tools.soak

clients: $(VENV)/.dev ## Drive real clients (installed into build/clients) against a real proxy
	$(IN_VENV) -m tools.clients

reference: $(VENV)/.dev ## Rewrite the generated parts of docs/
	$(IN_VENV) -m tools.reference

clean: ## Remove what `make` has made (not the instance folder)
	rm -rf .venv .venv-* *.egg-info build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# A Python from 3.11 up gets the newest mlx-lm; 3.10 gets 0.31, the last one made for it. An
# environment whose own Python is gone (after an upgrade) is made anew.
$(IN_VENV):
	@for oldest in 11 10; do for python in $(PYTHONS); do \
	  if $$python -c "import ensurepip, sys, venv; sys.exit(sys.version_info < (3, $$oldest))" \
	    >/dev/null 2>&1; then echo "Setting up $(VENV) with $$($$python --version)"; \
	    exec $$python -m venv --clear $(VENV); fi; \
	done; done; \
	echo "mlxproxy needs Python 3.10 or later, with venv; none was found as: $(PYTHONS)"; \
	echo "Install one (on a Mac: brew install python; on Debian: apt install python3-venv)."; exit 1

$(VENV)/.installed: setup.cfg pyproject.toml $(IN_VENV)
	@echo "Installing mlxproxy, mlx-lm and what they need into $(VENV): about 400 MB, only once"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.vision: $(VENV)/.installed
	@echo "Installing mlx-vlm and what it needs into $(VENV): about 500 MB, only once"
	@$(PIP) --editable '.[vision]'
	@touch $@

$(VENV)/.bench: $(VENV)/.dev
	@$(PIP) --editable '.[bench]'
	@touch $@

$(VENV)/.dev: setup.cfg pyproject.toml $(IN_VENV)
	@echo "Installing mlxproxy, mlx-lm and what the tests need into $(VENV): about 500 MB, only once"
	@$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.installed
