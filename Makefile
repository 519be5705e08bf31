# make demo: set up and run the demonstration. make test: set up and run the tests. make docs: the site, in build/site.
PYTHON ?= python3
VENV := .venv
# A test file stays with one worker, which sets up once what its tests share; files with the slowest tests come first.
WORKERS := -n 2 --dist loadfile --no-loadscope-reorder
PIP := $(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt
SOURCES := $(shell find pmc_fast kernels csrc -name '*.py' -o -name '*.cpp' -o -name '*.cu' -o -name '*.h' \
	-o -name '*.cmake') setup.py pyproject.toml CMakeLists.txt constraints.txt

.PHONY: demo test lint docs clean

demo: $(VENV)/.installed
	$(VENV)/bin/pmc-fast demo

test: $(VENV)/.editable
	$(VENV)/bin/python -m pytest $(WORKERS)

lint: $(VENV)/.editable
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' | xargs $(VENV)/bin/clang-format --dry-run -Werror

# bin/pip, since a machine without ensurepip leaves a bin/python that cannot install anything.
$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

# One of the two is installed at a time: each set-up removes the other's stamp before it starts. What an earlier build
# left in build/lib* would go into the wheel, files deleted since included.
$(VENV)/.installed: $(VENV)/bin/pip $(SOURCES)
	rm -rf $(VENV)/.editable build/lib* build/bdist*
	$(PIP) .
	touch $@

$(VENV)/.editable: $(VENV)/bin/pip $(SOURCES)
	rm -f $(VENV)/.installed
	$(PIP) -e '.[test]'
	touch $@

# Needs neither torch nor the compiled module: the reference is read from the sources. The variable hides a notice of the theme's.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict -f docs/site/mkdocs.yml

$(VENV)/.docs: $(VENV)/bin/pip pyproject.toml constraints.txt
	$(PIP) $$($(VENV)/bin/python -c 'import tomllib as t; print(*t.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info pmc_fast/*.so
