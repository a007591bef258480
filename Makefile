# Each target makes its own virtual environment when there is none, and needs nothing done before.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test check chart clean

demo: $(STAMP)
	@$(BIN)/ratchet demo

test: $(STAMP)
	@bash tests/packages.sh
	@bash tests/run.sh $(BIN)

check: $(STAMP)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports
	@$(BIN)/pytest tests/unit

chart: $(STAMP)
	@PYTHONPATH=. $(BIN)/python helm/generate.py

$(STAMP): pyproject.toml
	@echo "installing into $(VENV) (one to three minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --progress-bar on -q -e '.[dev]'
	@$(BIN)/pip uninstall -y -q torchaudio torchcodec  # pulled by vLLM: CUDA builds, whose import fails without CUDA
	@touch $@

clean:
	rm -rf $(VENV) .ratchet
