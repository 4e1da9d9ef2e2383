# make demo   set up .venv, draw a grid of images with the shipped model
# make test   set up .venv, lint, types, tests
# Both reuse .venv; a second call installs nothing unless setup.cfg or constraints.txt changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# On Linux without a GPU, TORCH_INDEX=https://download.pytorch.org/whl/cpu installs a torch of a tenth of the size.
TORCH_INDEX ?=
# Tests: one process a core, each with so many threads.
THREADS ?= 1
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt

.PHONY: demo web test lint format test-slow test-browser test-gpu clean

demo: $(VENV)/.stamp-app
	@$(BIN)/varkit sample fashion-var --num 50 --seed 0 --zoom 3 --out out/fashion-var.png
	@echo "The web demo: $(BIN)/varkit demo    (then open http://127.0.0.1:7860)"

web: $(VENV)/.stamp-app
	$(BIN)/varkit demo

test: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.stamp-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-slow: $(VENV)/.stamp-dev
	$(BIN)/python -m pytest -m slow

test-browser: $(VENV)/.stamp-dev
	$(BIN)/python -m pytest -m browser

test-gpu: $(VENV)/.stamp-dev
	$(BIN)/python -m pytest -m gpu

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "varkit needs Python 3.11 or newer; set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.stamp-app: setup.cfg pyproject.toml constraints.txt | $(BIN)/python
	@echo "setting up $(VENV) (torch is large: some minutes, about 6 GB; see TORCH_INDEX in the Makefile)"
	$(PIP) -e '.[app]'
	@touch $@

$(VENV)/.stamp-dev: setup.cfg pyproject.toml constraints.txt | $(BIN)/python
	@echo "setting up $(VENV) (torch is large: some minutes, about 6 GB; see TORCH_INDEX in the Makefile)"
	$(PIP) -e '.[app,dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
