PYTHON ?= python3
SCAN ?=
# As it was given, to the programs below by the environment: in a recipe a shell would run what a name
# has between backticks.
override SCAN := $(value SCAN)
export SCAN
# What the demo trains; deepsc by default.
MODEL ?=
override MODEL := $(value MODEL)
export MODEL
# Where the demo writes; runs/demo by default, runs/demo-MODEL for another model.
OUT ?=
override OUT := $(value OUT)
export OUT
# Passed to pip, e.g. PIP_FLAGS='--find-links ~/wheels'.
PIP_FLAGS ?=

# XLA compiles on one core: a process for each, a file of tests in one of them (conftest.py: which
# come first).
PARALLEL := -n auto --maxprocesses=8 --dist=loadfile --no-loadscope-reorder
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
INSTALLED_TEST := $(VENV)/.installed-test
INSTALLED_DOCS := $(VENV)/.installed-docs

.DEFAULT_GOAL := help
.PHONY: help venv demo gain learns claims parity mutations benchmark docs picture test test-slow test-scale lint types
.DELETE_ON_ERROR:

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | \
	  awk -F ':.*## ' '{ printf "  make %-10s %s\n", $$1, $$2 }'
	@echo "  variables: PYTHON=python3.12  MODEL=qchc_unet  SCAN=path/to/scan.nii.gz  OUT=runs/demo  PIP_FLAGS='...'"

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "$(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo 'not a Python'):" \
	    "Python 3.11 or newer is needed: name one with PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml | $(PY)
	@echo "installing the package into $(VENV)"
	$(PY) -m pip install --quiet $(PIP_FLAGS) -e .
	@touch $@

$(INSTALLED_TEST): pyproject.toml | $(PY)
	@echo "installing the package and its test extra into $(VENV) (PyTorch is in it: minutes)"
	$(PY) -m pip install --quiet $(PIP_FLAGS) -e '.[test]'
	@touch $@ $(INSTALLED)

$(INSTALLED_DOCS): pyproject.toml | $(PY)
	@echo "installing the package and its docs extra into $(VENV)"
	$(PY) -m pip install --quiet $(PIP_FLAGS) -e '.[docs]'
	@touch $@ $(INSTALLED)

venv: $(INSTALLED_TEST) ## make .venv with the package and its test extra

demo: $(INSTALLED) ## train, evaluate and predict on phantoms; MODEL=name; SCAN=file predicts that too
	$(PY) -m deepsc_jax.demo $${MODEL:+--model="$$MODEL"} $${OUT:+--out="$$OUT"} $${SCAN:+--scan="$$SCAN"}

gain: $(INSTALLED) ## joint training against each task alone, 3 seeds (after make demo; an hour or more)
	$(PY) -m deepsc_jax.gain --flagfile=configs/phantom.flags --data_dir="$${OUT:-runs/demo}/data" --out=runs/gain

learns: $(INSTALLED) ## what matters in how DeepSC-COVID learns, an arm each, kept in runs/learns (hours)
	$(PY) -m deepsc_jax.models.deepsc.arms $${OUT:+--out="$$OUT"}

claims: $(INSTALLED) ## what the papers of CNNCF and QC-HC U-Net claim, an arm each, kept in runs/claims (hours)
	$(PY) -m deepsc_jax.models.claims $${OUT:+--out="$$OUT"}

parity: $(INSTALLED_TEST) ## the numbers against the PyTorch reference's, as a table and runs/parity.json
	@mkdir -p runs
	$(PY) -m deepsc_jax.parity --json=runs/parity.json

mutations: $(INSTALLED_TEST) ## small deliberate errors, each of which a parity test must catch
	$(PY) tests/mutations.py

benchmark: $(INSTALLED_TEST) ## time beside PyTorch and MONAI: a table and runs/benchmark.json (long; nothing beside it)
	$(PY) -m deepsc_jax.benchmarking.bars --json=runs/benchmark.json

picture: ## docs/picture.png anew, from what make demo predicted
	@out="$${OUT:-runs/demo}"; set -- "$$out"/predictions/phantom-test-*/picture.png; [ $$# = 1 ] && [ -f "$$1" ] || { \
	  echo "$$out/predictions: one predicted phantom expected, found: $$*: keep one of them" >&2; exit 1; }; \
	cp "$$1" docs/picture.png

docs: $(INSTALLED_DOCS) ## the documentation as a site, runs/site/index.html; strict: no broken link
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

lint: $(INSTALLED_TEST) ## ruff: rules and format; import-linter: which folder may import which
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports

types: $(INSTALLED_TEST) ## pyright
	$(PY) -m pyright --pythonpath $(PY)

# Without LLVM's costly passes: compiling is most of the quick tests' time, and XLA's own passes stay.
test: lint types ## lint, types and the quick tests
	JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(PY) -m pytest -m 'not slow' $(PARALLEL)

test-slow: $(INSTALLED_TEST) ## the tests that take minutes each
	$(PY) -m pytest -m 'slow and not scale'

test-scale: $(INSTALLED_TEST) ## kills, lost processes and other tests of clusters
	$(PY) -m pytest -m scale
