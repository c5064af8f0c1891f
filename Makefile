# make run, test, lint, bench: each sets itself up. CPU only, unless JAX_PLATFORMS is set.
# PYTHON picks the interpreter, VENV the folder of the virtual environment, ARGS what is handed on to the command.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
export JAX_PLATFORMS ?= cpu

BIN = $(VENV)/bin
BASE = $(VENV)/installed-dev
FULL = $(VENV)/installed-tpu
BENCH = pareto fits accuracy planning_time sweep exactness cpu_budgets random_programs fuse_update linear_cross_entropy kernels cpu_kernels lossless compress frontier frozen offload residual_quality bit_allocation state_table state_peaks optimizer_time optimizer_quality optimizer_peers mezo_peak sharding sharding_devices sharding_rules multihost kernel_schedule

.DEFAULT_GOAL := help
.PHONY: help run test lint bench clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

run: $(BASE)  ## train a small language model twice, plain and under a memory budget, and compare
	$(BIN)/python experiments/train_lm.py $(ARGS)

test: $(FULL)  ## run the tests
	$(BIN)/python -m pytest $(ARGS)

lint: $(BASE)  ## run ruff and the rules of the house
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q tests/test_house.py

bench: $(FULL)  ## make every figure of the README (hours)
	@set -e; for name in $(BENCH); do \
		script=experiments/$$name.py; \
		if [ -f $$script ]; then echo "== $$script"; $(BIN)/python $$script $(ARGS); fi; \
	done

clean:  ## delete the virtual environments and everything that was built
	rm -rf .venv .venv312 build dist out *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BASE): setup.cfg pyproject.toml
	@echo "Setting up $(VENV) (a few minutes the first time) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

# libtpu is about half a GB and not published for every platform: the tests that need it skip without it.
$(FULL): $(BASE)
	@echo "Installing libtpu, which compiles for TPUs ahead of time (about half a GB) ..."
	@$(BIN)/python -m pip install --quiet --editable '.[dev,tpu]' || \
		echo "libtpu could not be installed: the tests that compile for TPUs will be skipped ('rm $@' to try again)."
	@touch $@
