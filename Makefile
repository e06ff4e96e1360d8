# Every target first makes sure that .venv holds what pyproject.toml asks for; when nothing changed, that costs nothing.
#   make train CONFIG=experiments/tiny/mor.yaml ARGS="--trainer.max_steps=20"

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= all,dev
UV_ARGS ?=

CONFIG ?= experiments/tiny/mor.yaml
ARGS ?=
BASE_CONFIGS ?= experiments/base/tiny_autoencoder.yaml experiments/base/tiny_diffusion.yaml
# a command to run on the finished base, for example a copy of its folder
BASE_EXPORT ?=
# the rows of the ablation, experiments/ablation/ROW.yaml; the others are compared with the last one
ABLATION_ROWS ?= tiny_lora4 tiny_lora10 tiny_lora_moe tiny_mor_v1 tiny_mor_v2 tiny_mor_detached tiny_mor
ABLATION_SEEDS ?= 0 1 2 3 4
ABLATION_OUT ?= runs/ablation
JOBS ?= 2
PYTEST_ARGS ?=

PY := $(VENV)/bin/python
STAMP := $(VENV)/.setup-stamp
MORSR := $(PY) -m morsr
PYTEST := $(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
# What the commands import, a quarter of what is installed: setup compiles it, the rest is compiled where it is used.
COMPILED := import morsr.training.cli, morsr.training.module, morsr.data, morsr.restoring, torch.utils.tensorboard; \
	from diffusers import AutoencoderTiny, DDPMScheduler, UNet2DConditionModel
SOURCES := $(wildcard src tests data_prep benchmarks)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help setup train eval base ablation check test test-all docs lint format clean

help: ## this list
	@echo "make TARGET [CONFIG=experiments/DIR/X.yaml] [ARGS=\"--trainer.max_steps=20 ...\"]"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' Makefile | awk -F'|' '{ printf "%-14s %s\n", $$1, $$2 }'

setup: $(STAMP) ## make .venv and install everything, at the versions of constraints.txt
	@:

# The overrides that keep unwanted packages out are read by uv from [tool.uv] in pyproject.toml. Many of the versions in
# constraints.txt have dropped Python 3.10: there uv picks the newest that still runs on it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v < (3, 13) else "morsr needs Python 3.10 to 3.12, $(PYTHON) is %d.%d: make setup PYTHON=python3.11" % v)'
	@test -x $(PY) || $(PYTHON) -m venv --without-pip $(VENV)
	@uv=$$(grep '^uv==' constraints.txt); command -v uv >/dev/null || test -x $(VENV)/bin/uv || \
	$(PYTHON) -m pip --python $(PY) install --quiet --disable-pip-version-check "$$uv" 2>/dev/null || \
	{ $(PY) -m ensurepip && $(PY) -m pip install --quiet --disable-pip-version-check "$$uv"; }
	@uv=$$(command -v uv || echo $(VENV)/bin/uv); pins=$$($(PY) -c 'import sys; print("-c constraints.txt" if sys.version_info >= (3, 11) else "")'); \
	"$$uv" pip install --python $(PY) $$pins $(UV_ARGS) -e ".[$(EXTRAS)]" pip
	@env -u PYTHONDONTWRITEBYTECODE $(PY) -c "$(COMPILED)"
	@touch $@

train: setup ## train the adapters: CONFIG, ARGS
	$(MORSR) fit --config $(CONFIG) $(ARGS)

eval: setup ## table of the newest trained (else the shipped) adapters on held-out photographs: CONFIG, ARGS
	$(MORSR) test --config $(CONFIG) $(ARGS)

base: setup ## train the tiny base, autoencoder then diffusion: BASE_CONFIGS, BASE_EXPORT, ARGS
	@set -e; for config in $(BASE_CONFIGS); do echo "$(MORSR) fit --config $$config $(ARGS)"; $(MORSR) fit --config $$config $(ARGS); done
	$(BASE_EXPORT)

ablation: setup ## train every row for five seeds and compare them: ABLATION_ROWS, ABLATION_SEEDS, ABLATION_OUT, ARGS
	@set -e; for seed in $(ABLATION_SEEDS); do for row in $(ABLATION_ROWS); do \
		run=$(ABLATION_OUT)/$$row/seed_$$seed; test -f $$run/finished && continue; rm -rf $$run; echo "$$run"; \
		$(MORSR) fit --config experiments/ablation/$$row.yaml --seed_everything=$$seed --model.seed=$$seed --data.seed=$$seed \
			--trainer.logger.init_args.save_dir=$(ABLATION_OUT) --trainer.logger.init_args.name=$$row \
			--trainer.logger.init_args.version=seed_$$seed $(ARGS); touch $$run/finished; done; done
	@set -e; for row in $(filter-out $(lastword $(ABLATION_ROWS)),$(ABLATION_ROWS)); do \
		$(MORSR) compare $(ABLATION_OUT)/$$row $(ABLATION_OUT)/$(lastword $(ABLATION_ROWS)); done

check: setup ## say what a run lacks before it starts: CONFIG, ARGS
	$(MORSR) check $(CONFIG) $(ARGS)

test: setup ## tests and doctests without the slow ones
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-all: setup ## all tests, README commands in full
	$(PYTEST) $(PYTEST_ARGS)

docs: setup ## the site, in build/site
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo "build/site/index.html"

lint: setup ## formatting, lint and types
	$(PY) -m ruff format --check $(SOURCES)
	$(PY) -m ruff check $(SOURCES)
	$(PY) -m mypy

format: setup ## format and fix in place
	$(PY) -m ruff format $(SOURCES)
	$(PY) -m ruff check --fix $(SOURCES)

clean: ## remove caches and build outputs; runs/ and .venv stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
