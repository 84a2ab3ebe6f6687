# `make demo` and `make test` do all the set-up that they need; see README.md.
SHELL := /bin/bash
.ONESHELL:
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PACKAGES := build/packages/.built
ARGS ?=

.PHONY: help setup system demo test check fuzz bench bench-accuracy bench-lanes bench-serving bench-serving-grpc soak docs lock clean

help:  ## List what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP) $(PACKAGES) system  ## Virtual environment, shipped models, broker

$(STAMP): pyproject.toml requirements/dev.txt requirements/data.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements/data.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

$(PACKAGES): $(STAMP) $(wildcard models/*.py models/*/*.py contract/manifest.py)
	$(BIN)/pithead models build --all --out build/packages
	touch $@

system:
	@./docker/system-packages.sh

demo: setup  ## The main job, told as a story; hand arguments on with ARGS="--once --headless"
	$(BIN)/pithead demo $(ARGS)

test: setup  ## All tests; what needs the machine to itself comes last
	$(BIN)/python -m pytest -n 3 --dist loadgroup -m "not alone" $(ARGS)
	$(BIN)/python -m pytest -m alone

check: $(STAMP)  ## Style, types, layers, wheel
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/wheel/check_wheel.py

fuzz: $(STAMP)  ## Five minutes of atheris on what decodes bytes; longer with ARGS="--seconds 3600"
	$(BIN)/python tests/fuzz/run.py $(ARGS)

bench: setup  ## Benchmarks, each beside a peer or a limit
	for b in benchmarks/bench_*.py; do $(BIN)/python $$b $(ARGS); done

bench-accuracy: setup  ## Detectors on labelled recordings, beside published figures
	$(BIN)/python benchmarks/bench_accuracy.py $(ARGS)

bench-lanes: setup  ## Lanes beside a bare loop on the same runtime
	$(BIN)/python benchmarks/bench_lane.py $(ARGS)

bench-serving: setup  ## Serving beside FastAPI, Triton and MLServer, from environments of their own
	@./docker/system-packages.sh bench
	$(BIN)/python benchmarks/bench_serving.py $(ARGS)
	$(BIN)/python benchmarks/bench_batching.py
	$(BIN)/python benchmarks/bench_swap.py

soak: setup  ## Thirty minutes of serving under load, with swaps: memory and descriptors stay what they were
	@./docker/system-packages.sh bench
	$(BIN)/python benchmarks/bench_swap.py --soak 30 $(ARGS)

bench-serving-grpc: setup  ## Serving over gRPC beside a bare grpc.aio script and Triton
	@./docker/system-packages.sh bench
	$(BIN)/python benchmarks/bench_serving_grpc.py $(ARGS)

lock: $(STAMP)  ## Pin dependencies again, with hashes and without index addresses
	$(BIN)/python requirements/lock.py

clean:  ## Remove everything that was built
	rm -rf $(VENV) .venvs build dist

docs: $(STAMP)  ## Write the documents that are made from code
	$(BIN)/python docs/generate.py
