# Every target makes .venv itself; a second run finds it made.
PYTHON ?= python3
OLDEST_PYTHON ?= python3.10
NEWEST_PYTHON ?= python3.13
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test docs screenshots lint format bench zoo mutants compat dist clean

demo: $(VENV)/.examples
	$(BIN)/python examples/mnist_cnn.py

# A worker per core; those of one file run in one worker, which makes what they share once.
test: $(VENV)/.dev
	$(BIN)/python tests/support/get_chromium.py
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

# The documentation as a website in build/site, which loads nothing from elsewhere. Only its search needs a server:
# .venv/bin/python -m http.server --directory build/site
docs: $(VENV)/.docs
	$(BIN)/python -m mkdocs build --strict

screenshots: $(VENV)/.dev
	$(BIN)/python tests/support/get_chromium.py
	$(BIN)/python docs/screenshots.py

# About a quarter of an hour on two quiet cores: what docs/performance.md is made of.
bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks price scale demo low_rank lanczos dense statistics performance

# An hour at most; the same command goes on where it was stopped.
zoo: $(VENV)/.zoo
	$(BIN)/python -m benchmarks.zoo build/zoo

# An hour or two; the same command goes on where it was stopped.
mutants: $(VENV)/.dev $(VENV)/.mutants
	$(BIN)/python tests/support/mutants.py build/mutants --processes 2

# Several GB of downloads; what came out is in docs/compatibility.md.
compat: $(VENV)/.dev
	$(BIN)/python tools/compat.py oldest build/compat/oldest --python $(OLDEST_PYTHON)
	$(BIN)/python tools/compat.py newest build/compat/newest --python $(NEWEST_PYTHON)

# Wheel and sdist in dist/, and what a user has of the wheel outside of this checkout; a few minutes.
dist: $(VENV)/.dev $(VENV)/.release
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/python -m tools.check_dist dist

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The extras are installed with constraints.txt, so that everybody has what was tested.
$(VENV)/.examples $(VENV)/.dev $(VENV)/.docs $(VENV)/.zoo $(VENV)/.mutants $(VENV)/.release: $(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$*]"
	touch $@
