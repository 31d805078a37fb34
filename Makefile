# `make demo` and `make test` set up everything they need in .venv, each by itself.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo check test lint quick proof kernels bench docs sanitize clean

demo: $(STAMP)
	$(BIN)/forktree demo

# While one works: lint, types, and the tests that take no more than a few seconds each. Within a minute on two cores.
check: $(STAMP)
	@$(MAKE) --no-print-directory -j2 lint quick

# Everything that needs no GPU and no sanitizer. One process a core, of one thread each.
test: $(STAMP) lint
	$(BIN)/pytest -q -n auto --maxprocesses 8 --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests -regex '.*\.\(hpp\|cpp\|cuh\|cu\|h\)')
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/mypy

QUICK := tests/kv tests/plan tests/search/test_steps.py tests/search/test_trace.py

quick: $(STAMP)
	$(BIN)/pytest -q -m "not slow" $(QUICK)

bench: $(STAMP)
	$(BIN)/python bench/decode.py

# The site, in build/site. A broken link, anchor or reference fails it.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/.docs: $(STAMP)
	$(BIN)/pip install -q -e ".[docs]"
	touch $@

# The core again under sanitizers, each build with a copy of the package, and the tests of what the core does. What a
# sanitizer finds ends the run. ThreadSanitizer cannot see OpenMP's locks, and older ones want addresses that are not
# random (setarch).
OPERATIONS := append_kv rotate_rows merge_states tree_attention tree_attention_cpu score_tokens plan threads fuzz
SANITIZED  := $(wildcard $(OPERATIONS:%=tests/*/test_%.py))
CHECKED    := -O1 -g -fno-sanitize-recover=all -DFORKTREE_EMULATE_AMX
RUNTIME     = $$($${CXX:-g++} -print-file-name=$(1))

sanitize: $(STAMP)
	CXXFLAGS="-fsanitize=address,undefined $(CHECKED)" \
		$(BIN)/python setup.py -q build --build-base build/asan --build-lib build/asan/lib
	LD_PRELOAD="$(call RUNTIME,libasan.so) $(call RUNTIME,libstdc++.so)" ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
		OMP_NUM_THREADS=4 PYTHONPATH=build/asan/lib $(BIN)/pytest -q --capture=sys -k "not triton" $(SANITIZED)
	CXXFLAGS="-fsanitize=thread -fno-openmp $(CHECKED)" \
		$(BIN)/python setup.py -q build --build-base build/tsan --build-lib build/tsan/lib
	$$(setarch -R true 2>/dev/null && echo setarch -R) env LD_PRELOAD="$(call RUNTIME,libtsan.so)" \
		TSAN_OPTIONS="halt_on_error=1 ignore_noninstrumented_modules=1 allocator_may_return_null=1" \
		OMP_NUM_THREADS=4 PYTHONPATH=build/tsan/lib $(BIN)/pytest -q --capture=sys -k "not triton" $(SANITIZED)

# What can be known of the GPU kernels without a GPU: the CUDA ones run on the CPU, under sanitizers; and what nvcc and two
# versions of Triton make of them is held against bench/results/kernels.json. `make kernels` compiles all that ships and
# writes that file anew.
EMULATED := $(wildcard $(OPERATIONS:%=tests/*/test_%.py) tests/ops/test_tree_attention_cuda.py)
OLDEST   := build/triton-3.6

proof: $(STAMP) $(OLDEST)
	FORKTREE_CUDA=emulate CXXFLAGS="-fsanitize=address,undefined $(CHECKED)" \
		$(BIN)/python setup.py -q build --build-base build/emulated --build-lib build/emulated/lib
	LD_PRELOAD="$(call RUNTIME,libasan.so) $(call RUNTIME,libstdc++.so)" ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
		OMP_NUM_THREADS=2 PYTHONPATH=build/emulated/lib $(BIN)/pytest -q --capture=sys -k cuda $(EMULATED)
	$(BIN)/python bench/kernels.py --check
	$(BIN)/python bench/kernels.py --check --triton $(OLDEST)

kernels: $(STAMP) $(OLDEST)
	$(BIN)/python bench/kernels.py
	$(BIN)/python bench/kernels.py --triton $(OLDEST)

$(OLDEST): | $(STAMP)
	$(BIN)/pip install -q --no-deps --target $@ triton==3.6.0

# Without a GPU the small CPU build of torch is installed first: a plain `torch` would bring gigabytes of CUDA.
$(STAMP): pyproject.toml setup.py $(wildcard csrc/* csrc/*/* csrc/*/*/*)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("forktree needs Python 3.11 or newer, got " + sys.version)'
	@set -e; get() { echo "installing $$1"; apt-get update -q && apt-get install -yq $$1; }; \
	$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || get python3-venv; \
	test -n "$$CXX$$(command -v c++)$$(command -v g++)$$(command -v clang++)" || get g++; \
	test -e "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" || get python3-dev
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	@command -v nvidia-smi >/dev/null 2>&1 && $(BIN)/pip install -q "torch>=2.11" || $(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist python/*.egg-info python/forktree/*.so
