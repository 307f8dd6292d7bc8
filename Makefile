# Every command that the README, the CI workflow and .ci/run use. `make help` lists them.
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:

# The first of these that is Python 3.11; `make setup PYTHON=/a/python3.11` says it outright.
PYTHON = $(shell for python in python3.11 python3 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
EXTRAS := quickstart unsloth trackers cluster dev bench

# What the locks cannot hold: torch, whose build the machine decides.
TORCH = $(shell sed -nE 's/^    "(torch==[^"]+)",$$/\1/p' pyproject.toml)
BOOTSTRAP = $(shell sed -nE 's/^([a-z-]+==[^ ;]+) \\$$/\1/p' requirements/bootstrap.lock)
CPU_TORCH_INDEX := https://download.pytorch.org/whl/cpu
PIP = $(BIN)/pip install -qq --disable-pip-version-check --no-input
# Nothing is resolved here: the locks name every file by its hash, and what builds the one source package too.
# Bytecode now, not in each of a run's processes: it halves the time to the first step where nothing is cached.
INSTALL = $(BIN)/uv pip install --quiet --compile-bytecode --no-deps --require-hashes --build-constraints requirements/bootstrap.lock \
	--python $(BIN)/python
ARE_INSTALLED = $(BIN)/python -c 'import sys; from importlib.metadata import version; \
	sys.exit(any(version(n).split("+")[0] != v for n, v in (pin.split("==") for pin in sys.argv[1:])))'

.PHONY: help setup setup-unsloth setup-trackers setup-cluster setup-dev quickstart test test-resume test-kernels test-cookbooks test-nodes test-submit test-image fuzz bench-data bench-data-memory lint format schema lock bench-overhead bench-resume bench-bucket bench-checkpoints bench-gpu clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-18s %s\n", $$1, $$2}' Makefile

# A step that was cut short leaves STAMP.begun behind, and the next run does it from the start.
$(STAMPS)/torch: requirements/bootstrap.lock pyproject.toml
	@if test -e $@.begun || ! $(BIN)/pip --version >/dev/null 2>&1; then \
	  test -n "$(PYTHON)" || { echo "error: no Python 3.11 is found; install it, or say make PYTHON=/path/to/python3.11" >&2; exit 1; }; \
	  echo "making $(VENV) with $(PYTHON)"; \
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

# Triton for its interpreter, which runs kernels on CPU. Beside the environment: where Triton can be imported, TRL takes a GPU for granted.
$(STAMPS)/interpreter: requirements/interpreter.lock $(STAMPS)/torch
	@echo "installing $<"
	@$(INSTALL) --target $(VENV)/interpreter -r $< && touch $@

setup: $(STAMPS)/quickstart  ## install what training and the quickstart need into .venv
setup-unsloth: setup $(STAMPS)/unsloth  ## add Unsloth (AGPL-3.0 parts, see README)
setup-trackers: setup $(STAMPS)/trackers  ## add Weights & Biases, MLflow and TensorBoard
setup-cluster: setup $(STAMPS)/cluster  ## add Ray's dashboard and job server, for the head of a cluster
setup-dev: setup-unsloth setup-trackers $(STAMPS)/dev $(STAMPS)/interpreter  ## add what the tests and the linters need

quickstart: setup  ## fine-tune a real 135M model on this machine, without a GPU or an account
	$(BIN)/python cookbooks/quickstart/prepare.py
	$(BIN)/python main.py cookbooks/quickstart/smollm2-135m.yaml

test: setup-dev  ## run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/integration/training tests  # the slow files first

fuzz: setup-dev  ## prepare 10,000 generated bad files: each is prepared or refused with a place (minutes)
	FUZZ_FILES=10000 $(BIN)/python -m pytest tests/unit/training/test_bad_files.py

test-resume: setup-dev  ## kill runs in every way on every kind of run, and compare to the last bit (an hour and three quarters on two cores)
	RESUME_GRID=1 $(BIN)/python -m pytest -n 2 tests/integration/training/test_resume.py

test-kernels: setup-dev  ## all that kernels and methods are spread over on CPU, and every part of bench-gpu, where `make test` takes a sample
	ALL_KERNELS=1 $(BIN)/python -m pytest tests/integration/training/test_loss_equality.py tests/integration/test_gpu_benchmark.py

test-cookbooks: setup-dev  ## run every cookbook that needs no GPU, with a tiny model, where `make test` takes a sample
	ALL_COOKBOOKS=1 $(BIN)/python -m pytest tests/integration/training/test_cookbooks.py

test-nodes: setup-dev  ## lose nodes of a cluster, wait for them and take them in, where `make test` takes a sample (a quarter of an hour)
	ALL_NODES=1 $(BIN)/python -m pytest tests/integration/training/test_two_nodes.py

test-submit: setup-dev setup-cluster  ## submit runs to a job server, and follow, stop and resume them (its packages slow the start of every Ray cluster)
	$(BIN)/python -m pytest tests/integration/training/test_submission.py tests/integration/training/test_clusters.py

test-image: setup-dev  ## do what the image's build installs, without Docker, and start what it starts (3 GB, a minute or two)
	TEST_IMAGE=1 $(BIN)/python -m pytest tests/integration/test_image.py

lint: setup-dev  ## check style, types, the doors between the rooms and the Dockerfile
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

schema: setup  ## make configs/schema.json, by which editors complete and check YAMLs, and keys.md
	$(BIN)/python -m configs.json_schema

format: setup-dev  ## rewrite the Python files as the linter wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-overhead: setup  ## measure what Anneal costs beside the bare trainer
	$(BIN)/python benchmarks/overhead.py

bench-data: setup  ## measure how fast rows are prepared beside datasets.map
	$(BIN)/python benchmarks/data.py

bench-data-memory: setup  ## measure the memory that preparing a file of 5 GB takes (half an hour, 20 GB of disk)
	$(BIN)/python benchmarks/data.py --gigabytes 5

bench-resume: setup  ## measure what it costs to send a killed run again
	$(BIN)/python benchmarks/resume.py

bench-checkpoints: setup-dev  ## measure what a checkpoint costs training
	$(BIN)/python benchmarks/checkpoints.py

bench-bucket: setup $(STAMPS)/bench  ## measure transfers to and from a bucket beside those of others
	$(BIN)/python benchmarks/bucket.py

bench-gpu: setup-unsloth  ## measure speed and memory on a GPU beside Unsloth's and TRL's own scripts (a round: three quarters of an hour are expected)
	$(BIN)/python benchmarks/gpu.py

lock: $(STAMPS)/torch  ## resolve pyproject.toml into requirements/*.lock
	export UV_CUSTOM_COMPILE_COMMAND="make lock"; \
	compile="$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --override requirements/overrides.txt"; \
	$$compile pyproject.toml -o requirements/runtime.lock && \
	for extra in $(EXTRAS); do \
	  $$compile --extra $$extra -c requirements/runtime.lock pyproject.toml -o requirements/$$extra.lock || exit 1; \
	done && \
	echo triton==3.7.1 | $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate - -o requirements/interpreter.lock && \
	printf '%s\n' "uv==$$($(BIN)/uv --version | cut -d' ' -f2)" setuptools filelock fsspec jinja2 networkx sympy typing-extensions \
	  | $$compile - -c requirements/runtime.lock -o requirements/bootstrap.lock

clean:  ## remove caches and .anneal (the embedded bucket, with the runs in it); .venv stays
	rm -rf .anneal .hypothesis .import_linter_cache .pytest_cache .ruff_cache unsloth_compiled_cache
	find . -path ./$(VENV) -prune -o -path ./.git -prune -o -type d -name __pycache__ -exec rm -rf {} +
