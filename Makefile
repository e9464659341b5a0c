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

peers: .peers/llama/.made .peers/llama/bin/llama-server  ## programs to compare with, each in an environment of its own

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

# llama.cpp's own server, from the sources that the package brings: a quarter of an hour on two cores.
.peers/llama/bin/llama-server: .peers/llama/.made
	.peers/llama/bin/python -m pip install --quiet --disable-pip-version-check cmake ninja
	.peers/llama/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python -d .peers/llama/src \
		llama-cpp-python==$$(.peers/llama/bin/python -c 'import llama_cpp; print(llama_cpp.__version__)')
	tar -xzf .peers/llama/src/*.tar.gz -C .peers/llama/src --strip-components 1
	PATH="$(CURDIR)/.peers/llama/bin:$$PATH" cmake -G Ninja -S .peers/llama/src/vendor/llama.cpp -B .peers/llama/src/build \
		-DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_BUILD_TESTS=OFF
	PATH="$(CURDIR)/.peers/llama/bin:$$PATH" cmake --build .peers/llama/src/build --target llama-server
	cp .peers/llama/src/build/bin/llama-server $@

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache
