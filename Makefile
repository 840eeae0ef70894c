# make demo: from nothing to a comparison.   make test: from nothing to a tested checkout.
PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= 2
BIN     := $(VENV)/bin
READY   := $(VENV)/ready
# Files of tests side by side, one thread each: two workers take about half as long as one on two cores.
PYTEST  := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile

# The test of MLflow's pages drives a real browser.
CHROMIUM := chromium chromium-browser google-chrome google-chrome-stable chrome
NO_CHROMIUM := needs Chromium: apt-get install chromium, brew install --cask chromium, or name one in CLPLAT_CHROMIUM

.PHONY: demo test test-all test-cluster test-gpu lint clean
.DEFAULT_GOAL := demo

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

demo: $(READY)
	$(BIN)/clplat run quickstart
	$(BIN)/clplat run quickstart_text

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	sh tests/static_checks.sh $(BIN)

test: lint
	$(PYTEST) -m 'not long and not cluster'

test-all: $(READY)
	@{ echo "$$CLPLAT_CHROMIUM"; for name in $(CHROMIUM); do command -v $$name; done; } | grep -q . \
		|| { echo "make $@ $(NO_CHROMIUM)"; exit 1; }
	$(PYTEST) -m 'long and not cluster'

# Needs slurm-wlm (apt-get install slurm-wlm) for a Slurm of one node, which the tests start and stop themselves.
test-cluster: $(READY)
	$(BIN)/pip install --quiet --editable '.[test,ray]'
	OMP_NUM_THREADS=1 $(BIN)/pytest -m cluster

test-gpu: $(READY)
	$(BIN)/pytest tests/gpu

clean:
	rm -rf $(VENV) build dist *.egg-info
