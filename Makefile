# make demo   the main job on handwritten digits, start to finish (under two minutes once installed)
# make test   the tests without those that take minutes; make test-all is what CI runs
#             both look at the notebooks in a browser where Chromium is installed, and say so where it is not
# make lab    JupyterLab on the notebooks
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-all lab lint clean

demo: $(STAMP)
	$(BIN)/obc demo

test: $(STAMP) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --ignore tests/browser -n 2 -m "not slow"
	$(BIN)/python -m pytest tests/browser -m "not slow"
	$(BIN)/python -m pytest -p no:cacheprovider --nbval-lax notebooks/0*.ipynb

test-all: $(STAMP) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --ignore tests/browser -n 2
	$(BIN)/python -m pytest tests/browser
	$(BIN)/python -m pytest -p no:cacheprovider --nbval-lax notebooks

lab: $(STAMP)
	$(BIN)/jupyter lab notebooks

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' || \
		{ echo "obc_tools needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[notebook,dev]"
	@touch $(STAMP)

clean:
	rm -rf $(VENV) runs
