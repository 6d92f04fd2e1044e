# `make demo` and `make test` need Python 3.11+ and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test docs export notebooks clean readme

$(VENV)/.installed: setup.py settings.ini pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/dreamllm-edu demo --out _demo

test: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python tests/check_notebooks.py
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q tests

docs: $(VENV)/.installed
	$(BIN)/nbdev_docs

export: $(VENV)/.installed  # write dreamllm_edu/ from the notebooks
	$(BIN)/python tools/export.py
	$(BIN)/nbdev_clean

notebooks: $(VENV)/.installed  # run every notebook and keep its outputs
	HF_HUB_OFFLINE=1 $(BIN)/python tests/check_notebooks.py --keep

clean:
	rm -rf _demo _docs _proc .quarto build dist *.egg-info

readme: $(VENV)/.installed  # README.md from nbs/index.ipynb
	$(BIN)/python tests/make_readme.py
