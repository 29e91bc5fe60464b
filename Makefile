# Every target does its own set-up; a second call skips what is done.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/quickstart

.PHONY: setup calvin quickstart test lint smoke clean

setup: $(VENV)/installed

$(VENV)/installed: requirements.txt setup.py
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v >= (3, 11) else f"Python {v[0]}.{v[1]} found; wam_jax needs 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "this Python cannot make virtual environments: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

calvin: setup
	$(BIN)/pip install --quiet --disable-pip-version-check --only-binary=:all: pybullet==3.2.7

quickstart: setup
	$(BIN)/python -m experiments.reproduce --config=experiments/configs/quickstart.py --workdir=$(WORKDIR)

test: setup
	$(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder tests

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

smoke: setup
	$(BIN)/python -m pytest -q tests/test_binaries.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info
