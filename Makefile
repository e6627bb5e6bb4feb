# The targets a user or a developer needs. On a fresh machine each of them first makes .venv, with the
# exact packages of requirements-dev.txt, and builds the operators against the torch in it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CSRC := $(shell find csrc -type f 2>/dev/null)
CXX_FILES := $(filter %.cpp %.h %.inl %.cu %.cuh,$(CSRC))
DEMO := .demo
TYPED := .cache/typed

.PHONY: demo test test-all lint bench clean venv build

demo: build
	@mkdir -p $(DEMO)
	$(BIN)/deltafx run vtest --model mobilenet_v2_trunk --compare \
	    --output $(DEMO)/overlay.mp4 --picture $(DEMO)/overlay.png --report $(DEMO)/report.json

test: build
	$(BIN)/python -m pytest -m "not slow"

test-all: build
	$(BIN)/python -m pytest

# mypy does not know the package mapping of pyproject.toml, so it gets the tree as it is installed.
lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(TYPED) && mkdir -p $(TYPED)/deltafx
	ln -s $(CURDIR)/deltafx/* $(CURDIR)/passes $(CURDIR)/models_zoo $(TYPED)/deltafx
	MYPYPATH=$(TYPED) $(BIN)/python -m mypy --package deltafx
	$(if $(CXX_FILES),$(BIN)/clang-format --dry-run -Werror $(CXX_FILES))

bench: build $(VENV)/.bench
	$(BIN)/python -m benchmarks

clean:
	rm -rf build dist .demo .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f deltafx/_C*.so

venv: $(VENV)/.packages
build: $(VENV)/.built

$(VENV)/.packages: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	@touch $@

# The editable install compiles the operators; later changes to csrc go through ninja alone.
$(VENV)/.installed: $(VENV)/.packages pyproject.toml
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

$(VENV)/.built: $(VENV)/.installed setup.py $(CSRC)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

$(VENV)/.bench: $(VENV)/.packages requirements-bench.txt
	$(BIN)/python -m pip install --quiet --requirement requirements-bench.txt
	@touch $@
