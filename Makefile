# Every command that the README, the CI workflow and .ci/run use. `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
EXTRAS := quickstart unsloth dev
# Nothing is resolved at install time: the locks name every file by its hash.
INSTALL = $(BIN)/uv pip install --quiet --no-deps --require-hashes --python $(BIN)/python -r

.PHONY: help setup setup-unsloth setup-dev quickstart test lint format lock clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

$(STAMPS)/torch: requirements/bootstrap.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/bootstrap.lock
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(sed -nE 's/^    "(torch==[^"]+)",$$/\1/p' pyproject.toml)"
	touch $@

$(STAMPS)/%: requirements/%.lock $(STAMPS)/torch
	$(INSTALL) $<
	touch $@

setup: $(STAMPS)/quickstart  ## install what the quickstart needs into .venv
setup-unsloth: setup $(STAMPS)/unsloth  ## add Unsloth (AGPL-3.0 parts, see README)
setup-dev: setup-unsloth $(STAMPS)/dev  ## add what the tests and the linters need

lock:  ## resolve pyproject.toml into requirements/*.lock
	compile="$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --override requirements/overrides.txt"; \
	export UV_CUSTOM_COMPILE_COMMAND="make lock"; \
	$$compile pyproject.toml -o requirements/runtime.lock; \
	for extra in $(EXTRAS); do $$compile --extra $$extra -c requirements/runtime.lock pyproject.toml -o requirements/$$extra.lock; done; \
	echo "uv==$$($(BIN)/uv --version | cut -d' ' -f2)" | $$compile - -o requirements/bootstrap.lock
