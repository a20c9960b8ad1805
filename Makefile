# Commands of the project; `make` alone lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TWO_AT_A_TIME := --numprocesses 2 --dist loadfile --no-loadscope-reorder

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
export TORCHDYNAMO_DISABLE ?= 1
export DO_NOT_TRACK ?= 1
export PREFECT_HOME ?= $(CURDIR)/.fedpipe/prefect
export PREFECT_SERVER_ANALYTICS_ENABLED ?= false
export PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS ?= 120
export MLFLOW_DISABLE_TELEMETRY ?= true

.PHONY: help install demo evidence test quick check format lint types layers clean

help: ## list the commands
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP) ## create the environment and install pinned dependencies

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else f"Python 3.11 or newer is needed, found {sys.version.split()[0]}; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	touch $(STAMP)

demo: $(STAMP) ## tune MiniLM on CLINC150 across four edges, to a registered and promoted model (a few minutes)
	$(BIN)/fedpipe run examples/intents/federation.yaml

evidence: $(STAMP) ## run FedPipe beside full fine-tuning, uniform LoRA and FedAdapter, the reduced set (half an hour)
	@mkdir -p $(PREFECT_HOME)  # Prefect warns where it cannot make it
	$(BIN)/python benchmarks/evidence.py --reduced

test: $(STAMP) ## run all tests, two at a time
	$(BIN)/pytest $(TWO_AT_A_TIME)

quick: $(STAMP) ## run the tests that take less than ten seconds each
	$(BIN)/pytest $(TWO_AT_A_TIME) -m "not slow"

check: format lint types layers test ## format, lint, types, import layers and tests

format: $(STAMP) ## check the formatting (ruff format . mends it)
	$(BIN)/ruff format --check .

lint: $(STAMP) ## look for faults
	$(BIN)/ruff check .

types: $(STAMP) ## check the types
	$(BIN)/mypy

layers: $(STAMP) ## check that imports run flows -> tasks -> fedpipe_core
	$(BIN)/lint-imports

clean: ## remove the environment and everything runs left behind
	rm -rf $(VENV) .fedpipe *.egg-info
