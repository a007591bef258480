# Each target makes its own virtual environment when there is none, and needs nothing done before.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# uv leaves it to the first import to compile a module: without bytecode on the disk every process would.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test packages check chart docs clean

demo: $(STAMP)
	@$(BIN)/ratchet demo

test:
	@$(MAKE) --no-print-directory -j 2 $(STAMP) packages
	@bash tests/run.sh $(BIN)

check: $(STAMP)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports
	@$(BIN)/pytest tests/unit

chart: $(STAMP)
	@PYTHONPATH=. $(BIN)/python helm/generate.py

docs: $(STAMP)
	@$(BIN)/python -m docs.site

$(STAMP): pyproject.toml install.py
	@echo "installing into $(VENV) (one to three minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python install.py
	@touch $@

packages:
	@bash tests/packages.sh

clean:
	rm -rf $(VENV) .ratchet
