# Every target first makes sure that .venv holds what pyproject.toml asks for; when nothing changed, that costs nothing.
#   make train CONFIG=experiments/mor_tiny.yaml ARGS="--trainer.max_steps=20"

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= all,dev
UV_ARGS ?=

CONFIG ?= experiments/mor_tiny.yaml
ARGS ?=
BASE_CONFIGS ?= experiments/base_tiny_autoencoder.yaml experiments/base_tiny_diffusion.yaml
# a command to run on the finished base, for example a copy of its folder
BASE_EXPORT ?=
# the rows of the table, NAME=CONFIG.yaml; the last one is what the others are compared with
ABLATION := experiments/ablation_tiny
ABLATION_ROWS ?= LoRA-r4=$(ABLATION)_lora4.yaml LoRA-r10=$(ABLATION)_lora10.yaml LoRA-MoE=$(ABLATION)_lora_moe.yaml \
	MoR-v1=$(ABLATION)_mor_v1.yaml MoR-v2=$(ABLATION)_mor_v2.yaml MoR=$(ABLATION)_mor.yaml
BENCHES ?= adapter degrade inference train
JOBS ?= 2
PYTEST_ARGS ?=

PY := $(VENV)/bin/python
STAMP := $(VENV)/.setup-stamp
MORSR := $(PY) -m morsr
PYTEST := $(PY) -m pytest -n $(JOBS) --dist loadfile
SOURCES := $(wildcard src tests data_prep benchmarks)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help setup train eval base ablation data-check test test-all lint format bench clean

help: ## this list
	@echo "make TARGET [CONFIG=experiments/X.yaml] [ARGS=\"--trainer.max_steps=20 ...\"]"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' Makefile | awk -F'|' '{ printf "%-14s %s\n", $$1, $$2 }'

setup: $(STAMP) ## make .venv and install everything, at the versions of constraints.txt
	@:

# The overrides that keep unwanted packages out are read by uv from [tool.uv] in pyproject.toml. Many of the versions in
# constraints.txt have dropped Python 3.10: there uv picks the newest that still runs on it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v < (3, 13) else "morsr needs Python 3.10 to 3.12, $(PYTHON) is %d.%d: make setup PYTHON=python3.11" % v)'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@command -v uv >/dev/null || test -x $(VENV)/bin/uv || $(PY) -m pip install --quiet --disable-pip-version-check "$$(grep '^uv==' constraints.txt)"
	@uv=$$(command -v uv || echo $(VENV)/bin/uv); pins=$$($(PY) -c 'import sys; print("-c constraints.txt" if sys.version_info >= (3, 11) else "")'); \
	"$$uv" pip install --python $(PY) $$pins $(UV_ARGS) -e ".[$(EXTRAS)]"
	@touch $@

train: setup ## train the adapters: CONFIG, ARGS
	$(MORSR) fit --config $(CONFIG) $(ARGS)

eval: setup ## table of the newest trained (else the shipped) adapters on held-out photographs: CONFIG, ARGS
	$(MORSR) test --config $(CONFIG) $(ARGS)

base: setup ## train the tiny base, autoencoder then diffusion: BASE_CONFIGS, BASE_EXPORT, ARGS
	@set -e; for config in $(BASE_CONFIGS); do echo "$(MORSR) fit --config $$config $(ARGS)"; $(MORSR) fit --config $$config $(ARGS); done
	$(BASE_EXPORT)

ablation: setup ## train every row of the ablation for five seeds and compare them: ABLATION_ROWS, ARGS
	$(MORSR) ablation $(ABLATION_ROWS) $(ARGS)

data-check: setup ## say what is missing before a run starts: CONFIG
	$(MORSR) data-check --config $(CONFIG) $(ARGS)

test: setup ## tests and doctests without the slow ones
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-all: setup ## all tests, README commands in full
	$(PYTEST) $(PYTEST_ARGS)

lint: setup ## formatting, lint and types
	$(PY) -m ruff format --check $(SOURCES)
	$(PY) -m ruff check $(SOURCES)
	$(PY) -m mypy

format: setup ## format and fix in place
	$(PY) -m ruff format $(SOURCES)
	$(PY) -m ruff check --fix $(SOURCES)

bench: setup ## tables of speed: BENCHES, ARGS
	@set -e; for name in $(BENCHES); do $(MORSR) bench $$name $(ARGS); done

clean: ## remove caches and build outputs; runs/ and .venv stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
