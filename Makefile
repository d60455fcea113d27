# make train   creates .venv from pinned versions and trains recipe=gpt_tiny on real text
# make test    the same environment, then the test suite
# make lint    ruff and pyright
PYTHON ?= python3
BIN := .venv/bin
NAME ?= gpt_tiny-$(shell date +%Y%m%d-%H%M%S)

.PHONY: train test lint
# on the largest power of two of the GPUs, which divides the sequence; else on two CPU processes
train: .venv/.installed
	@gpus=$$($(BIN)/python -c 'import torch; n = torch.cuda.device_count(); print(n and 1 << n.bit_length() - 1)'); \
	if [ "$$gpus" -gt 0 ]; then \
		$(BIN)/torchrun --nproc-per-node "$$gpus" train.py recipe=gpt_tiny precision=bf16 name=$(NAME); \
	else \
		OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 train.py recipe=gpt_tiny name=$(NAME); \
	fi

test: .venv/.installed
	$(BIN)/python -m pytest

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

.venv/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"longctx needs Python 3.11 or newer, this is {v.major}.{v.minor}; make PYTHON=python3.11 ...")'
	@echo 'creating .venv from requirements.txt'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@echo 'and beside it the Triton of torch 2.11, for which the tests compile kernels too'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .venv/triton-3.6.0 triton==3.6.0
	@touch $@
