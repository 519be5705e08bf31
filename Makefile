# make demo: set up and run the demonstration. make test: set up and run the tests.
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt
SOURCES := $(shell find pmc_fast kernels csrc -name '*.py' -o -name '*.cpp' -o -name '*.h') setup.py pyproject.toml \
	CMakeLists.txt constraints.txt

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(VENV)/bin/pmc-fast demo

test: $(VENV)/.editable
	$(VENV)/bin/python -m pytest

lint: $(VENV)/.editable
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# One of the two is installed at a time: each set-up removes the other's stamp.
$(VENV)/.installed: $(VENV)/bin/python $(SOURCES)
	$(PIP) .
	rm -f $(VENV)/.editable && touch $@

$(VENV)/.editable: $(VENV)/bin/python $(SOURCES)
	$(PIP) -e '.[test]'
	rm -f $(VENV)/.installed && touch $@

clean:
	rm -rf $(VENV) build *.egg-info pmc_fast/*.so
