# make demo   the main job on handwritten digits, start to finish (under two minutes once installed)
# make test   the tests without the slow ones, the teaching notebooks, and one of them in a browser
# make test-all  all tests, all notebooks, and the widgets and teaching notebooks in a browser (about an hour)
# make browser  the browser's part of that: a real JupyterLab and Chromium (CHROMIUM=path if it is not found)
# make zoo    every torchvision classifier and all timm families through pruning and its proofs (hours; resumable)
# make fuzz N=5000  random networks against pruning by hand, a row each in runs/fuzz.csv (hours; resumable)
# make faults  kills, flipped bits and a full disk against runs, a row each in results/faults.csv (hours; resumable)
# make notebooks  run all notebooks and store them with their outputs, figures as stills too
# make lab    JupyterLab on the notebooks
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CHROMIUM ?= $(firstword $(foreach name,chromium chromium-browser google-chrome,$(shell command -v $(name) 2>/dev/null)))
export CHROMIUM
UNITS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --ignore tests/browser -p no:rerunfailures -n 2
# Notebooks that train for long have a small setting, which runs everything and learns nothing.
# A notebook is one file, and stays with one of the two workers.
NOTEBOOKS := OBC_TOOLS_SMALL=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:cacheprovider -p no:rerunfailures \
	-n 2 --dist loadfile --nbval-lax
# A browser on a busy machine may miss a click: what fails is done again, and said to have been.
BROWSER := $(BIN)/python -m pytest tests/browser --reruns 2 -rR

# A notebook that the browser runs, checking the same outputs, is not run twice.
ifeq ($(CHROMIUM),)
SMOKE := $(MAKE) --no-print-directory no-browser
ALL_IN_BROWSER := $(SMOKE)
NOT_SMOKED := notebooks/0*.ipynb
NOT_IN_BROWSER := notebooks
else
SMOKE := $(BROWSER) -m "not slow"
ALL_IN_BROWSER := $(BROWSER)
NOT_SMOKED := $(filter-out notebooks/05%,$(sort $(wildcard notebooks/0*.ipynb)))
NOT_IN_BROWSER := $(sort $(wildcard notebooks/[123]*.ipynb))
endif

.PHONY: demo test test-all browser no-browser zoo fuzz faults notebooks lab lint clean

demo: $(STAMP)
	$(BIN)/obc demo

test: $(STAMP) lint
	$(UNITS) -m "not slow"
	$(NOTEBOOKS) $(NOT_SMOKED)
	@$(SMOKE)

test-all: $(STAMP) lint
	$(UNITS)
	$(NOTEBOOKS) $(NOT_IN_BROWSER)
	@$(ALL_IN_BROWSER)

browser: $(STAMP)
	@$(ALL_IN_BROWSER)

no-browser:
	@echo '*************************************************************************************'
	@echo '*** No Chromium was found: the browser tests were NOT run.                        ***'
	@echo '*** Install the package "chromium", or say where it is: make CHROMIUM=... browser ***'
	@echo '*************************************************************************************'

zoo: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/zoo.py

N ?= 5000
fuzz: $(STAMP)
	PYTHONPATH=.:tests OMP_NUM_THREADS=1 $(BIN)/python tests/fuzzing.py $(N) runs/fuzz.csv

faults: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore benchmarks/faults.py

notebooks: $(STAMP)
	BROWSER_PATH="$(CHROMIUM)" $(BIN)/python notebooks/store.py

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
	@# Without its dependencies: they bring the OpenCV that needs a screen's libraries; `tasks` has the one that does not.
	$(BIN)/python -m pip install --quiet --no-deps "ultralytics>=8.4" "ultralytics-thop>=2.2.3"
	@touch $(STAMP)

clean:
	rm -rf $(VENV) runs
