# `make serve` and `make test` set everything up in .venv on their first run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: serve test test-gpu soak lint format clean

# CONFIG=configs/production.toml serves that instead of the embedded demo.
serve: $(VENV)/.installed
	@exec $(BIN)/nmoe serve $(if $(CONFIG),--config $(CONFIG))

# TESTS="tests/test_config.py -k name" runs those alone.
test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(TESTS)

# Every CUDA path against its reference; collects nothing where there is no NVIDIA driver.
test-gpu: $(VENV)/.installed-test
	$(BIN)/python -m pytest tests/gpu

# Random load for so many minutes (20 before a release), of which nothing may be left.
MINUTES ?= 2
soak: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.soak --minutes $(MINUTES)

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nmoe needs Python 3.11 or newer: make PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV)"
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	$(INSTALL) --editable '.[$*]'
	@touch $@
