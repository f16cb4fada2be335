# Every target works from an empty clone with Python 3.11 or newer, pip and make.
# PIP_ARGS reaches pip, for instance to name another package index.
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_DATA := datasets/demo
DEMO_RUN := results/demo

# The folders kernels/ and datasets/ must never shadow the packages of these names.
export PYTHONSAFEPATH := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-gpu lint format typecheck bench-data kernels clean

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## Install the program and its tools into .venv

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed: make setup PYTHON=python3.11" >&2; exit 1; }
	@echo "Installing into $(VENV); the first time this takes a few minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(PIP_ARGS) -c constraints.txt -e ".[dev]"
	@touch $@

demo: ## Build data, evaluate, sweep and plot with the bundled model, on a CPU, in minutes
	@echo "What you will see: long prompts are built, and one small model answers them twice,"
	@echo "with full attention and with ShadowKV; then a sweep over ShadowKV's settings measures"
	@echo "accuracy and speed of each, and pictures of the trade-off are drawn."
	@$(MAKE) --no-print-directory setup
	HF_HUB_OFFLINE=1 $(BIN)/shadowkv build-data ruler --tokenizer demo --context-length 4k \
		--num-samples 3 --tasks niah_single_1,niah_multikey_1,vt --output $(DEMO_DATA)
	HF_HUB_OFFLINE=1 $(BIN)/shadowkv eval --model demo --data $(DEMO_DATA) \
		--method full,shadowkv --output $(DEMO_RUN)-eval
	HF_HUB_OFFLINE=1 $(BIN)/shadowkv sweep --model demo --data $(DEMO_DATA) \
		--method full,shadowkv --sparse-budget 64,256 --rank 32,160 --chunk-size 8 \
		--output $(DEMO_RUN)-sweep
	HF_HUB_OFFLINE=1 $(BIN)/shadowkv plot $(DEMO_RUN)-sweep

test: setup ## Run the fast tests
	$(BIN)/pytest $(PYTEST_ARGS)

test-gpu: setup ## Run the tests that need a GPU
	$(BIN)/pytest -m gpu $(PYTEST_ARGS)

lint: setup ## Check style, format and types; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## Format the code and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: setup ## Check types only
	$(BIN)/mypy

bench-data: setup ## Measure how fast prompts are built
	$(BIN)/python -m shadowkv_cli.bench.data_speed

kernels: ## Compile the CUDA kernels
	@echo "There is nothing to build yet: the operations run on torch. See kernels/README.md."

clean: ## Remove caches and build outputs; keeps .venv, datasets/ and results/
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find shadowkv_cli tests -name __pycache__ -type d -prune -exec rm -rf {} +
