# The two commands of the README are `make demo` and `make test`; both install what they need into .venv first.

PYTHON ?= python3
TP ?= 2
PP ?= 2
# Where the CPU build of torch comes from: PyPI's build for Linux brings several gigabytes of CUDA libraries.
# `make setup TORCH_INDEX=...` names another index, where PyTorch's own index is out of reach.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH_VERSION := 2.13.0

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test docs mutants test-slurm slurm-packages lint setup gpu-check bench-convert clean
.DEFAULT_GOAL := help

.PHONY: help
help:
	@echo 'make demo [TP=2 PP=2]  train a tiny model through the three stages on CPU and question it'
	@echo 'make test              linters and all tests that need no GPU'
	@echo 'make docs              the documentation as a site in site/'
	@echo 'make mutants           break the source in one place after the other: are the tests able to fail? (MUTANTS=word)'
	@echo 'make test-slurm        the batch scripts on a real Slurm cluster of this machine (as root; installs Slurm)'
	@echo 'make lint              ruff, mypy, shellcheck'
	@echo 'make setup             install everything into $(VENV)'
	@echo 'make gpu-check         tests on one GPU, in the current Python environment ($(PYTHON))'
	@echo 'make bench-convert     full-size checkpoint conversions against copying (60 GB of disk; BENCH=options)'
	@echo 'make clean             remove $(VENV) and caches'

demo: $(INSTALLED)
	$(BIN)/python tools/demo.py --tensor $(TP) --pipeline $(PP)

test: lint
	$(BIN)/python -m pytest -m 'not gpu and not slurm'

docs: $(INSTALLED)
	$(BIN)/python docs/generate_configuration.py
	$(BIN)/properdocs build --strict --quiet
	@echo 'Open site/index.html'

mutants: $(INSTALLED)
	$(BIN)/python -W ignore -m tests.mutants.check $(MUTANTS)

test-slurm: $(INSTALLED) slurm-packages
	$(BIN)/python -m pytest -m slurm tests/slurm

# Slurm, munge and Open MPI from Debian, where that is possible; without them the tests that need them are skipped.
slurm-packages:
	@if PATH="$$PATH:/usr/sbin" sh -c 'command -v slurmctld && command -v slurmd && command -v munged && command -v mpirun' \
	  >/dev/null; then :; elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	    apt-get install -y -qq --no-install-recommends slurm-wlm munge openmpi-bin >/dev/null \
	    || echo 'Slurm could not be installed: its tests are skipped'; \
	else echo 'Slurm cannot be installed here (needs root and apt-get): its tests are skipped'; fi

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck --external-sources launch/*.sh slurm/*.sh slurm/*.sbatch slurm/site.env.example .ci/run

gpu-check:
	$(PYTHON) -m pytest -m gpu -s tests/gpu

bench-convert: $(INSTALLED)
	$(BIN)/python benchmarks/bench_convert.py $(BENCH)

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml requirements/cpu.txt requirements/te-contract.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, found: $$($(PYTHON) --version 2>&1); set PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "Python's venv module is missing; on Debian or Ubuntu: sudo apt-get install python3-venv"; exit 1; }
	@echo 'Installing into $(VENV): about 400 MB to download, some minutes the first time'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-deps --retries 1 --index-url $(TORCH_INDEX) torch==$(TORCH_VERSION)
	$(BIN)/pip install --quiet --constraint requirements/cpu.txt --editable '.[test,lint,docs]'
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(VENV)/te-contract --requirement requirements/te-contract.txt
	touch $@

clean:
	rm -rf $(VENV) site .mypy_cache .pytest_cache .ruff_cache *.egg-info
