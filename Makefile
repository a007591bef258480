# Each target makes its own virtual environment when there is none, and needs nothing done before.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One environment; the tests' holds all that the demo needs, and is not installed twice.
FOR_DEMO := $(VENV)/.installed-local
FOR_TESTS := $(VENV)/.installed-dev
# uv leaves it to the first import to compile a module: without bytecode on the disk every process would.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test long outside packages check chart docs lock audit release clean

demo: $(or $(wildcard $(FOR_TESTS)),$(FOR_DEMO))
	@$(BIN)/ratchet demo

test:
	@$(MAKE) --no-print-directory -j 2 $(FOR_TESTS) packages
	@bash tests/run.sh $(BIN)

# Whole benches, hundreds of draws, every recipe, and what restarts everything, one after the other.
long: $(FOR_TESTS)
	@bash tests/packages.sh
	@OMP_NUM_THREADS=1 $(BIN)/pytest -m long tests

# Against what users have beside Ratchet, hours with Kubernetes. What this machine cannot run is skipped, and named at the end.
outside: $(FOR_TESTS)
	@$(BIN)/python -m tests.outside --write-table

check: $(FOR_TESTS)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports
	@$(BIN)/pytest -m "not long" tests/unit

chart: $(FOR_TESTS)
	@PYTHONPATH=. $(BIN)/python helm/generate.py

docs: $(FOR_TESTS)
	@$(BIN)/python -m docs.site

$(VENV)/.installed-%: pyproject.toml client/pyproject.toml methods/pyproject.toml install.py
	@echo "installing what '$*' needs into $(VENV) (one to three minutes)"
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or later is needed, and $(PYTHON) is " \
	  + sys.version.split()[0] + ".\nfix: name another one, as in: make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python install.py $*
	@touch $@

lock: $(FOR_TESTS)
	@bash locks/lock.sh $(BIN)/uv

# Known vulnerabilities of what the locks name.
audit: $(FOR_TESTS)
	@bash locks/audit.sh $(abspath $(BIN)/uv)

release: $(FOR_TESTS)
	@$(BIN)/python release.py $(VERSION)

packages:
	@bash tests/packages.sh

clean:
	rm -rf $(VENV) .ratchet
