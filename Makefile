# `make demo` and `make test` are all that a fresh machine needs: each makes .venv when it is missing.
PYTHON ?= python3
BIN := .venv/bin
PORT ?= 8000

.PHONY: demo venv test test-fast test-slow test-browser check bench peers docs clean

demo: .venv/.core  ## a model is made, served, voted on and improved; ends with the chat page open
	$(BIN)/prairie demo --port $(PORT) $(ARGS)

venv: .venv/.dev

test: .venv/.dev  ## all but the slow tests, a process a core: threads of several processes would only wait for each other
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(ARGS)

test-fast: .venv/.dev  ## without whole recipes and kills
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m 'not slow and not browser and not gpu and not long' $(ARGS)

test-slow: .venv/.dev  ## kill tests and whole recipes, many minutes
	$(BIN)/python -m pytest -m slow $(ARGS)

test-browser: .venv/.dev  ## drives the chat page in a headless Chromium
	$(BIN)/python -m pytest -m browser $(ARGS)

check: .venv/.dev  ## ruff, mypy, the floors
	$(BIN)/ruff check prairie tests benchmarks
	$(BIN)/ruff format --check prairie tests benchmarks
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_floors.py

bench: .venv/.dev  ## every benchmark, one JSON object each
	for name in ops pretrain sft adapters dpo startup flywheel swap serving selfplay; do $(BIN)/python -m benchmarks.$$name --json; done

peers: .peers/llama/.made  ## programs to compare with, each in an environment of its own

docs: .venv/.dev  ## checks that every command and recipe in the docs exists
	$(BIN)/python -m pytest tests/test_docs.py

.venv/.core: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/.dev: .venv/.core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# Built from source: half a gigabyte and some minutes of compiling.
.peers/llama/.made:
	test -x .peers/llama/bin/python || $(PYTHON) -m venv .peers/llama
	.peers/llama/bin/python -m pip install --quiet --disable-pip-version-check 'llama-cpp-python[server]' numpy
	touch $@

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache
