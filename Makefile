# The two commands of the README are `make demo` and `make test`; both install what they need first.

# Each Python has an environment of its own: .venv for the python3 of this machine, .venv-3.12 for `PYTHON=python3.12` where
# that is another one. The stamp bears the version, so that an environment of another Python is made anew.
PYTHON ?= python3
SERIES_OF := -c 'import sys; print("%d.%d" % sys.version_info[:2])'
INTERPRETER := $(shell sh requirements/find_python.sh $(PYTHON))
SERIES := $(if $(INTERPRETER),$(shell $(INTERPRETER) $(SERIES_OF)))
VENV := $(if $(filter $(SERIES),$(shell python3 $(SERIES_OF))),.venv,.venv-$(SERIES))
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed-$(SERIES)
TP ?= 2
PP ?= 2
# Where the CPU build of torch comes from. Out of reach of this index, torch is PyPI's build without its CUDA libraries;
# TORCH_SOURCE=index or TORCH_SOURCE=pypi allows one way only (requirements/install_torch.py).
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH_SOURCE ?= auto
# megatron-core has one version for Python 3.11 and another one from 3.12 on; this is the Python of the other one, and the
# tests that could tell them apart.
OTHER_PYTHON := $(if $(filter 3.11,$(SERIES)),python3.12,python3.11)
ENGINE_TESTS := tests/distributed tests/unit/engine tests/engines tests/unit/test_te_contract.py tests/end_to_end/test_resume.py \
  tests/end_to_end/test_saving.py tests/end_to_end/test_stages.py
# What `make test-fast` runs beside the unit tests that are not marked slow: a training run, a generation, real ranks.
SMOKE_TESTS := tests/distributed/test_model_equals_reference.py tests/recipe/test_generation_ends.py \
  tests/end_to_end/test_metrics.py::test_only_logged_steps_are_recorded

.PHONY: demo test test-fast test-engines test-engine docs mutants test-slurm slurm-packages lint setup gpu-check bench-convert clean
.DEFAULT_GOAL := help

.PHONY: help
help:
	@echo 'make demo [TP=2 PP=2]  train a tiny model through the three stages on CPU and question it'
	@echo 'make test              linters and all tests that need no GPU'
	@echo 'make test-fast         after every edit: ruff and the quick tests of every room, within 90 s on two idle cores'
	@echo 'make test-engines      distributed and resume tests with the megatron-core of $(OTHER_PYTHON), where there is one'
	@echo 'make docs              the documentation as a site in site/'
	@echo 'make mutants           break the source in one place after the other: are the tests able to fail? (MUTANTS=word)'
	@echo 'make test-slurm        the batch scripts on a real Slurm cluster of this machine (as root; installs Slurm)'
	@echo 'make lint              ruff, mypy, shellcheck'
	@echo 'make setup             install everything into $(VENV) (PYTHON=python3.12: into an environment of its own)'
	@echo 'make gpu-check         tests on one GPU, in the current Python environment ($(PYTHON))'
	@echo 'make bench-convert     full-size checkpoint conversions against copying (60 GB of disk; BENCH=options)'
	@echo 'make clean             remove the environments and caches'

demo: $(INSTALLED)
	$(BIN)/python tools/demo.py --tensor $(TP) --pipeline $(PP)

test: lint
	$(BIN)/python -m pytest -m 'not gpu and not slurm'

test-fast: $(INSTALLED)
	$(BIN)/ruff check --quiet .
	$(BIN)/python -m pytest -m 'not slow and not gpu and not slurm' tests/unit $(SMOKE_TESTS)

test-engines:
	@if sh requirements/find_python.sh $(OTHER_PYTHON) >/dev/null; then $(MAKE) test-engine PYTHON=$(OTHER_PYTHON); \
	else echo 'No $(OTHER_PYTHON) was found: its megatron-core is NOT tested here (docs/versions.md)'; fi

test-engine: $(INSTALLED)
	$(BIN)/python -m pytest -m 'not gpu and not slurm' $(ENGINE_TESTS)

docs: $(INSTALLED)
	$(BIN)/python docs/generate_configuration.py
	$(BIN)/python docs/generate_job_states.py
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
	$(BIN)/shellcheck --external-sources launch/*.sh slurm/*.sh slurm/*.sbatch slurm/site.env.example requirements/*.sh .ci/run

gpu-check:
	$(PYTHON) -m pytest -m gpu -s tests/gpu

bench-convert: $(INSTALLED)
	$(BIN)/python benchmarks/bench_convert.py $(BENCH)

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml $(wildcard requirements/*.txt requirements/*.py)
	@[ -n '$(INTERPRETER)' ] || { echo 'PYTHON=$(PYTHON): no such Python runs here'; exit 1; }
	@$(INTERPRETER) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'Python 3.11 or newer is needed, found: $(SERIES); set PYTHON=...'; exit 1; }
	@$(INTERPRETER) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "Python's venv module is missing; on Debian or Ubuntu: sudo apt-get install python3-venv"; exit 1; }
	@echo 'Installing into $(VENV): 400 MB to download for Python 3.11, 950 MB at most from 3.12 on, some minutes the first time'
	@[ "$$($(BIN)/python $(SERIES_OF) 2>/dev/null)" = '$(SERIES)' ] || $(INTERPRETER) -m venv --clear $(VENV)
	$(BIN)/python requirements/install_torch.py --index $(TORCH_INDEX) --source $(TORCH_SOURCE)
	$(BIN)/pip install --quiet --constraint requirements/cpu.txt --editable '.[test,lint,docs]'
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(VENV)/te-contract --requirement requirements/te-contract.txt
	touch $@

clean:
	rm -rf .venv .venv-3.* site .mypy_cache .pytest_cache .ruff_cache *.egg-info
