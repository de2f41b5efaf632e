# Every target makes .venv itself; a second run finds it made.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test screenshots lint format clean

demo: $(VENV)/.examples
	$(BIN)/python examples/mnist_cnn.py

# A worker per core; those of one file run in one worker, which makes what they share once.
test: $(VENV)/.dev
	$(BIN)/python tests/support/get_chromium.py
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

screenshots: $(VENV)/.dev
	$(BIN)/python tests/support/get_chromium.py
	$(BIN)/python docs/screenshots.py

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
$(VENV)/.examples $(VENV)/.dev: $(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$*]"
	touch $@
