# `make help` lists the targets. The environment lives in .venv; PYTHON chooses the interpreter it is made with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
.DEFAULT_GOAL := help
.PHONY: help dev install run test lint format settings bench clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

dev: $(VENV)/.installed-dev ## install everything and serve the embedded model on 127.0.0.1:8000
	HOST=127.0.0.1 $(BIN)/python -m adapters.local

install: $(VENV)/.installed ## install what the server needs, no more

run: | $(VENV)/.installed ## serve as in production, configured by the environment and .env
	$(BIN)/python -m adapters.local

test: $(VENV)/.installed-dev ## run the tests
	$(BIN)/python -m pytest -q

lint: $(VENV)/.installed-dev ## ruff, strict mypy, and the generated parts of README and .env.example
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m infra.settings_table --check

format: $(VENV)/.installed-dev ## rewrite the sources as ruff would have them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

settings: $(VENV)/.installed-dev ## write .env.example and the README's table from core/settings.py
	$(BIN)/python -m infra.settings_table

bench: $(VENV)/.installed-dev ## measure over HTTP
	$(BIN)/python -m infra.bench

clean: ## remove the environment and the caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info

# A stamp is newer than pyproject.toml when what it lists is installed; nothing is installed twice.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@infra/install.sh $(VENV)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	@infra/install.sh $(VENV) dev
	@touch $@ $(VENV)/.installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || \
	  { echo "Python 3.11 to 3.13 is needed; this is $$($(PYTHON) --version). Try: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "No venv module. Debian and Ubuntu: apt install python3-venv"; rm -rf $(VENV); exit 1; }
