# `make demo` and `make test` need Python 3.11+ and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint format test-lowest docs export notebooks clean readme diagrams gpu gpu-bundle

$(VENV)/.installed: setup.py settings.ini pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/dreamllm-edu demo --out _demo

test: lint
	HF_HUB_OFFLINE=1 $(BIN)/python tests/check_notebooks.py
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q tests

lint: $(VENV)/.installed  # style and likely mistakes; the rules stand in pyproject.toml
	$(BIN)/ruff check dreamllm_edu tests tools benchmarks

format: $(VENV)/.installed  # wrap long statements of tests and tools, sort their imports
	$(BIN)/ruff check --quiet --select I --fix tests tools benchmarks
	$(BIN)/python tools/long_lines.py

test-lowest:  # the oldest versions of the libraries that settings.ini admits, in an environment of their own
	PYTHON=$(PYTHON) bash tools/lower_bounds.sh

docs: $(VENV)/.installed  # _docs/; needs Quarto
	$(BIN)/python tools/docs.py

export: $(VENV)/.installed  # write dreamllm_edu/ from the notebooks
	$(BIN)/python tools/export.py
	$(BIN)/nbdev_clean

notebooks: $(VENV)/.installed  # run every notebook and keep its outputs
	HF_HUB_OFFLINE=1 $(BIN)/python tests/check_notebooks.py --keep

clean:
	rm -rf _demo _docs _gpu _proc .quarto build dist *.egg-info

readme: $(VENV)/.installed  # README.md from nbs/index.ipynb
	$(BIN)/python tests/make_readme.py

diagrams:  # nbs/images/system-*.svg; needs nothing but Python
	$(PYTHON) tools/diagrams.py

gpu:  # at most 6 minutes on one GPU, no network; needs PYTHON with torch and the packages that CONTRIBUTING.md lists
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) tests/gpu/check.py --out _gpu

gpu-bundle:  # _gpu/bundle.tar.gz: what `make gpu` needs on another machine, with every path's size
	$(PYTHON) tests/gpu/bundle.py --out _gpu/bundle.tar.gz
