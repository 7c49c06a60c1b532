# `make help` lists the targets. The environment lives in .venv; PYTHON chooses the interpreter it is made with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SAM := build/sam/bin/sam
UV := build/uv/bin/uv
.DEFAULT_GOAL := help
.PHONY: help dev install run url test check lint format settings bench rie sam image image-test lock lock-check clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

dev: $(VENV)/.installed-embedded ## install the server and SmolLM2, and serve it on 127.0.0.1:8000
	HOST=127.0.0.1 LOCAL_ADMIN=true $(BIN)/python -m adapters.local

install: $(VENV)/.installed ## install what the server needs, no more

run: | $(VENV)/.installed ## serve as in production, configured by the environment and .env
	$(BIN)/python -m adapters.local

url: $(VENV)/.installed-embedded ## serve a local Lambda function URL on 127.0.0.1:9000: the Lambda runtime, its events, its stream
	$(BIN)/python -m infra.emulator.function_url

test: $(VENV)/.installed-dev rie ## run the tests
	$(BIN)/python -m pytest -q

check: lint test ## what CI runs: lint, then the tests

lint: $(VENV)/.installed-dev $(SAM) ## ruff, strict mypy, the generated docs/settings.md and .env.example, the template, the Dockerfiles
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m infra.settings_table --check
	$(BIN)/cfn-lint template.yaml
	$(BIN)/hadolint Dockerfile.lambda
	SAM_CLI_TELEMETRY=0 $(SAM) validate --lint --template template.yaml

format: $(VENV)/.installed-dev ## rewrite the sources as ruff would have them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

settings: $(VENV)/.installed-dev ## write docs/settings.md and .env.example from core/settings.py
	$(BIN)/python -m infra.settings_table

bench: $(VENV)/.installed-dev ## measure over HTTP
	$(BIN)/python -m infra.bench

rie: $(VENV)/.installed-dev ## fetch Amazon's Lambda emulator out of the aws-sam-cli wheel into build
	@$(BIN)/python -m infra.emulator.rie

sam: $(SAM) ## install SAM CLI into build/sam, because its pins fit no other environment

image: ## build the Lambda image as slm-api-server:lambda; ENGINE=docker or podman, BUILD_OPTIONS='--build-arg ...'
	$(or $(ENGINE),$(shell docker info >/dev/null 2>&1 && echo docker || echo podman)) build $(BUILD_OPTIONS) -f Dockerfile.lambda \
	  --build-arg EMBEDDED=on -t slm-api-server:lambda .

image-test: $(VENV)/.installed-dev $(SAM) ## build the Lambda image with a model and run it as Lambda and SAM do
	$(BIN)/python -m infra.docker.image_test

# Pins stay as they are unless pyproject.toml forbids them; LOCK_OPTIONS=--upgrade takes the newest.
LOCK := $(UV) pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --no-header --quiet \
  --no-emit-package llama-cpp-python

lock: $(UV) ## write infra/docker/requirements.lock, what the images install; LOCK_OPTIONS=--upgrade renews the pins
	$(LOCK) $(LOCK_OPTIONS) --output-file infra/docker/requirements.lock

lock-check: $(UV) ## fail if infra/docker/requirements.lock is not what `make lock` would write
	cp infra/docker/requirements.lock build/requirements.lock
	$(LOCK) --output-file build/requirements.lock
	sed 's|build/requirements.lock|infra/docker/requirements.lock|' build/requirements.lock | diff infra/docker/requirements.lock -

clean: ## remove the environment and the caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info

# A stamp is newer than pyproject.toml when what it lists is installed; nothing is installed twice.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@infra/install.sh $(VENV)
	@touch $@

$(VENV)/.installed-embedded: pyproject.toml | $(BIN)/python
	@infra/install.sh $(VENV) embedded
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	@infra/install.sh $(VENV) dev
	@touch $@ $(VENV)/.installed-embedded $(VENV)/.installed

$(SAM):
	$(PYTHON) -m venv build/sam
	build/sam/bin/pip install --quiet aws-sam-cli==1.170.0

$(UV):
	$(PYTHON) -m venv build/uv
	build/uv/bin/pip install --quiet uv==0.13.9

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || \
	  { echo "Python 3.11 to 3.13 is needed; this is $$($(PYTHON) --version). Try: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "No venv module. Debian and Ubuntu: apt install python3-venv"; rm -rf $(VENV); exit 1; }
