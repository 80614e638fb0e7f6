# `make demo` and `make test` need only Python 3.10 to 3.13: both make .venv from nothing.

PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
INSTALLED := $(VENV)/.installed
CACHE := .cache

.PHONY: help demo test test-unit test-interpreter test-loopback test-gpu property lint types format clean

help:
	@echo 'make demo              ship a small model'"'"'s KV cache between processes and check it'
	@echo 'make demo ARGS="..."   the same with other options (kvpack demo --help)'
	@echo 'make test              every suite that needs no GPU'
	@echo 'make test-unit, test-interpreter, test-loopback, test-gpu   one suite'
	@echo 'make property          20,000 random topologies, and every combination of parallelism'
	@echo 'make lint, types, format, clean'

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/kvpack demo $(ARGS)

test: $(INSTALLED)
	$(BIN)/python tests/run_suites.py

test-unit test-interpreter test-loopback test-gpu: test-%: $(INSTALLED)
	$(BIN)/python tests/run_suites.py $* $(if $(ARGS),-- $(ARGS))

# More cases than the tests have time for; minutes to an hour.
property: $(INSTALLED)
	cd tests && $(BIN)/python property_cases.py $(ARGS)
	cd tests && $(BIN)/python axis_combinations.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mypy cannot follow the mapped folders of an editable install, so it sees a built copy.
types: $(INSTALLED)
	rm -rf $(CACHE)/source $(CACHE)/built
	mkdir -p $(CACHE)/source
	cp -r pyproject.toml README.md LICENSE kvpack kernels transport profiling $(CACHE)/source
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation \
		--target $(CACHE)/built $(CACHE)/source
	cd $(CACHE)/built && $(BIN)/mypy --strict --config-file $(CURDIR)/pyproject.toml \
		--cache-dir $(CURDIR)/$(CACHE)/mypy --package kvpack

clean:
	rm -rf $(VENV) $(CACHE) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
