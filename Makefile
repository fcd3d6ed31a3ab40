# One way in: every target sets up what it needs in .venv, from a fresh clone.
PYTHON ?= python3
VENV   := .venv
SEED   ?= 0
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: help install demo chain test check format bench clean
help:            ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt $(wildcard packages/*/pyproject.toml)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar off -c constraints.txt \
		-e packages/bridges -e packages/encoders -e packages/llm -e '.[dev]'
	@touch $@

install: $(READY)  ## make .venv and install the four packages into it

demo: $(READY)   ## CLIP on real drawings, then two bridges from it into a language model, compared
	$(BIN)/latentmodal fit clip/emoji resume=true
	$(BIN)/latentmodal fit lm/emoji_small resume=true
	$(BIN)/latentmodal ablate demo

chain: $(READY)  ## MiniGPT-4 on the scenes: stage 1, curation, stage 2 (SEED=0; half an hour)
	BIN=$(BIN) SEED=$(SEED) bash tools/chain.sh

check: $(READY)  ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: check      ## check, then every test
	$(BIN)/python -m pytest -m "not gpu"

format: $(READY) ## rewrite the sources as `make check` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## side-by-side timings against named peers
	$(BIN)/python benchmarks/run.py

clean:           ## remove the environment and caches, never runs/
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
