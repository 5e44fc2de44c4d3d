# `make demo` and `make test` are all that one needs: each sets up .venv first, and only where something changed.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint docs bench cases cases-keras keras repairs zoo clean

demo: .venv/demo
	@$(BIN)/isograd demo

test: lint
	@$(BIN)/python -m pytest

lint: .venv/dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

# Everything of Keras on each of its backends; `make test` runs what takes long there on one of them.
keras: .venv/dev
	@KERAS_SUITES=all $(BIN)/python -m pytest tests/frameworks/keras

# The documentation as a site that needs no network, in site/.
docs: .venv/dev
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo site/index.html

# `make cases RESCORE=1` judges what was recorded before by the rules as they are now.
cases: .venv/dev
	@$(BIN)/python cases/score.py $(if $(RESCORE),--rescore)

# The same for the Keras programs, of which a few are run on JAX and the others on TensorFlow.
cases-keras: .venv/dev
	@$(BIN)/python cases/score.py --keras $(if $(RESCORE),--rescore)

# What `isograd fix` makes of the faulty programs; after `make cases`.
repairs: .venv/dev
	@$(BIN)/python cases/repair.py

# `make zoo FRESH=1` records healthy programs anew that are recorded and unchanged.
zoo: .venv/dev
	@$(BIN)/python zoo/run.py $(if $(FRESH),--fresh)

# In its own environment: what it compares with (wandb, TensorBoard, Lightning) is no part of isograd's development.
bench: .bench-venv/installed
	@.bench-venv/bin/python benchmarks/bench.py

.venv/bin/python:
	@$(PYTHON) -m venv .venv

.venv/demo: .venv/bin/python pyproject.toml constraints.txt
	@echo "installing isograd and PyTorch into .venv (once; some minutes)" >&2
	@$(INSTALL) --editable '.[demo]'
	@touch $@

.venv/dev: .venv/bin/python pyproject.toml constraints.txt
	@echo "installing isograd, PyTorch and the development tools into .venv (once; some minutes)" >&2
	@$(INSTALL) --editable '.[dev]'
	@touch $@ .venv/demo

.bench-venv/installed: pyproject.toml constraints.txt benchmarks/requirements.txt
	@echo "installing isograd and what it is compared with into .bench-venv (once; some minutes)" >&2
	@$(PYTHON) -m venv .bench-venv
	@.bench-venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--requirement benchmarks/requirements.txt --editable '.[demo]'
	@touch $@

clean:
	rm -rf .venv .bench-venv build dist site .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
