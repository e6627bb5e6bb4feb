# The targets a user or a developer needs. On a fresh machine each of them first makes .venv, with the
# exact packages of requirements-dev.txt, and builds the operators against the torch in it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CSRC := $(shell find csrc -type f 2>/dev/null)
CXX_FILES := $(filter %.cpp %.h %.inl %.cu %.cuh,$(CSRC))
DEMO := .demo
TYPED := .cache/typed

.PHONY: demo test test-all lint format bench bench-gpu sanitize clean venv build

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

format: venv
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format .
	$(if $(CXX_FILES),$(BIN)/clang-format -i $(CXX_FILES))

bench: build $(VENV)/.bench
	$(BIN)/python -m benchmarks

# On a machine with a CUDA device and a CUDA build of torch.
bench-gpu: build
	$(BIN)/python -m benchmarks.gpu

# Of CUDA's tools, each over a spread of the operators' tests; the caching allocator would hide
# errors within its blocks. Tests that hold a result against cuDNN's are left out: racecheck breaks
# off in some of its kernels, and initcheck does not see what they write.
SANITIZED := bfloat16-65-random or (test_conv2d_features and random) or test_lists_hold or \
    (test_listed and one) or (test_depthwise and one) or in_place_sums
sanitize: build
	for tool in memcheck "racecheck --kernel-name kns=deltafx" initcheck; do \
	    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	    $(BIN)/python -m pytest -q tests/ops tests/cuda --device cuda -k "$(SANITIZED)" \
	    || exit 1; done

clean:
	rm -rf build dist .demo .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f deltafx/_C*.so

venv: $(VENV)/.packages
build: $(VENV)/.built $(VENV)/.installed

$(VENV)/.packages: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	@touch $@

# Minutes the first time; later only what a change to csrc touches.
$(VENV)/.built: $(VENV)/.packages setup.py $(CSRC)
	@mkdir -p build
	@echo "building the operators (log: build/operators.log)"
	@$(BIN)/python setup.py --quiet build_ext --inplace > build/operators.log 2>&1 \
	    || { cat build/operators.log; exit 1; }
	@touch $@

# The editable install finds the object files of the step before and compiles nothing anew.
$(VENV)/.installed: $(VENV)/.packages pyproject.toml | $(VENV)/.built
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

$(VENV)/.bench: $(VENV)/.packages requirements-bench.txt
	$(BIN)/python -m pip install --quiet --requirement requirements-bench.txt
	@touch $@
