# `make` lists what there is. Everything happens in .venv; nothing is installed anywhere else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-stamp
# Tests spend half of their time waiting for processes; a module's tests stay together, for what they share.
AT_ONCE ?= 2
PYTEST := $(BIN)/python -m pytest -n $(AT_ONCE) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test check format client bench chaos clean

help: ## List the targets.
	@echo "FLOps: from a link to an ML repository to a federated model. Targets:"
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv with FLOps and its tools (again only when pyproject.toml changed).
	@:

demo: $(STAMP) ## Train MNIST over three learners on this machine, with live progress.
	@$(BIN)/python examples/demo.py

test: $(STAMP) ## Run every test.
	@$(PYTEST)

check: $(STAMP) ## Format, lint, types, import rules, tests: what CI runs.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST) --reruns 1 --max-suite-reruns 3 --rerun-show-tracebacks

format: $(STAMP) ## Format the code and mend what ruff can mend.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

client: $(STAMP) ## Generate the Python client from the API's OpenAPI document.
	$(BIN)/python -m flops.api.document > src/flops/client/openapi.json.new
	mv src/flops/client/openapi.json.new src/flops/client/openapi.json
	$(BIN)/python -m flops.client.generate

bench: $(STAMP) ## Measure rounds and a whole project (a few minutes; the full set: docs/performance.md).
	$(BIN)/python -m benchmarks.rounds --learners 2 --bytes 10000 --rounds 50 --json -
	$(BIN)/python -m benchmarks.rounds --learners 50 --bytes 10000 --rounds 20 --json -
	$(BIN)/python -m benchmarks.rounds --learners 10 --bytes 10000000 --rounds 5 --json -
	$(BIN)/python -m benchmarks.project --json -

chaos: $(STAMP) ## Kill, freeze and cut real projects over and over; they must end with the same bits (half an hour).
	$(BIN)/python -m tests.chaos --kills 200
	$(BIN)/python -m tests.chaos --kills 60 --mode hierarchical

clean: ## Remove .venv, caches and build outputs; FLOPS_HOME stays.
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last: an interrupted installation is taken up again by the next make.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "'$(PYTHON)' is not Python 3.11 or later: $$($(PYTHON) --version 2>/dev/null || echo it does not run)" >&2; \
	  echo "  - install one (Debian: apt install python3 python3-venv), or name it: make setup PYTHON=python3.12" >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make virtual environments: its venv module is missing" >&2; \
	  echo "  - install it (Debian: apt install python3-venv), then run make again" >&2; \
	  exit 1; }
	@echo "Installing FLOps and its tools into $(VENV) (about a minute) ..."
	@$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $(STAMP)
