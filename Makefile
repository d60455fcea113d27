# Each target sets up what it needs in .venv, from pinned versions. `make help` lists them.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
NAME ?= gpt_tiny-$(shell date +%Y%m%d-%H%M%S)

.PHONY: help install train test test-all lint docs

help: ## lists the targets
	@sed -n 's/^\([a-z-]*\):.*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

install: .venv/.run ## sets up .venv and nothing else

# on the largest power of two of the GPUs, which divides the sequence; else on two CPU processes
train: .venv/.run ## trains recipe=gpt_tiny on real text (NAME=... names the run)
	@gpus=$$($(BIN)/python -c 'import torch; n = torch.cuda.device_count(); print(n and 1 << n.bit_length() - 1)'); \
	if [ "$$gpus" -gt 0 ]; then \
		$(BIN)/torchrun --nproc-per-node "$$gpus" train.py recipe=gpt_tiny precision=bf16 name=$(NAME); \
	else \
		OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 train.py recipe=gpt_tiny name=$(NAME); \
	fi

test: .venv/.dev .venv/triton-3.6.0 ## the test suite, some nine minutes on two CPU cores
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m 'not slow'

test-all: .venv/.dev .venv/triton-3.6.0 .venv/triton-3.8.0 .venv/triton-3.9.0 ## that and the long tests, before a release
	LONGCTX_KILLS=17 LONGCTX_THOROUGH=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

lint: .venv/.dev ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

docs: .venv/.docs ## the pages and the API reference as HTML, in docs/build/html
	$(BIN)/sphinx-build --quiet --fail-on-warning docs docs/build/html

.venv/.run: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"longctx needs Python 3.11 or newer, this is {v.major}.{v.minor}; make PYTHON=python3.11 ...")'
	@echo 'creating .venv from requirements.txt'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) -r requirements.txt
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

.venv/.dev: .venv/.run requirements-dev.txt
	@echo 'adding what tests and linters need, from requirements-dev.txt'
	@$(PIP) --no-deps -r requirements-dev.txt
	@touch $@

# the Tritons of torch 2.11, 2.14 and 2.15, for which the tests compile kernels too
.venv/triton-%: | .venv/.run
	@echo 'adding Triton $*, for which the tests compile kernels'
	@$(PIP) --no-deps --target $@.new triton==$*
	@mv $@.new $@

.venv/.docs: .venv/.run requirements-docs.txt
	@$(PIP) --no-deps -r requirements-docs.txt
	@touch $@
