# `make demo` and `make test` need nothing but Python and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SEEDS ?= 2000
PIP_INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test test-unit simulate test-versions keras-suite test-exhaustive lint docs screenshots release-check bench clean

demo: $(VENV)/installed
	$(BIN)/raykeras fit pipelines/digits.py

test: $(VENV)/installed-test
	$(MAKE) --jobs 2 --output-sync=target lint test-unit
	$(MAKE) simulate
	$(BIN)/python -m pytest tests/integration tests/system tests/compat tests/simulation --numprocesses 2 --dist loadgroup

simulate: $(VENV)/installed-test
	$(BIN)/python -m tests.simulation --seeds $(SEEDS)

keras-suite: $(VENV)/installed-test
	$(PIP_INSTALL) --editable ".[test,keras-suite]"
	$(BIN)/python -m tests.compat.keras_suite $(if $(TF_KERAS),--tf-keras $(TF_KERAS))

test-versions:
	$(PYTHON) -m tests.compat.versions $(SETS)

test-exhaustive: lint
	$(BIN)/python -m pytest --exhaustive --numprocesses 2 --dist loadgroup

test-unit: $(VENV)/installed-test
	$(BIN)/python -m pytest tests/unit

lint: $(VENV)/installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

release-check: $(VENV)/installed-release
	$(BIN)/python -m tests.support.release

screenshots: $(VENV)/installed-test $(VENV)/installed-docs
	$(BIN)/python -m tests.support.screenshots $(NAMES)

bench: $(VENV)/installed-test
	set -e; for name in ingest fit start workers callbacks feed latency planning memory; do \
		$(BIN)/python -m benchmarks.$$name --json build/benchmarks/$$name.json; \
	done; for name in exactness kill_points object_store saving soak control_plane hosts faults; do \
		$(BIN)/python -m benchmarks.$$name; \
	done

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/installed-test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) --editable ".[test]"
	@touch $@ $(VENV)/installed

$(VENV)/installed-docs: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) --editable ".[docs]"
	@touch $@ $(VENV)/installed

$(VENV)/installed-release: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) --editable ".[test,release]"
	@touch $@ $(VENV)/installed $(VENV)/installed-test

clean:
	rm -rf $(VENV) runs build *.egg-info
