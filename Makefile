# make quickstart | test | test-all | check | study | study-growing | bench | env | clean      (make without a target lists them)
#
# Variables:  PYTHON=python3.12   the interpreter that makes .venv (3.10 to 3.13)
#             PIP_FLAGS="..."     more flags for every pip install, e.g. --index-url of CPU-only torch wheels
#             PYTEST_FLAGS="..."  more flags for pytest, e.g. "-k growth -x"
#             JOBS=2              test files that run at once; a test may start four ranks, each on one thread

PYTHON ?= python3
PIP_FLAGS ?=
PYTEST_FLAGS ?=
JOBS ?= 2
VENV ?= .venv

BIN := $(abspath $(VENV))/bin
PY := $(BIN)/python
LOG := $(VENV)/install.log
STAMP := $(VENV)/.complete
PIP_BARE := $(PY) -m pip install --disable-pip-version-check --no-input $(PIP_FLAGS)
PIP := $(PIP_BARE) -c constraints.txt
SCRIPTS := $(wildcard pretrain_sgt.py tools/*.py tools/bench/*.py)
# One thread per process: the ranks of a test share the machine's cores.
THREADS := OMP_NUM_THREADS=1
# One file, one worker, so that a file's fixtures are made once; tests/conftest.py begins with the longest files.
IN_PARALLEL := -q -n $(JOBS) --dist loadfile --no-loadscope-reorder
PYTEST = $(THREADS) $(PY) -m pytest $(IN_PARALLEL)

# $(call stage,text,command): one line for the reader, the command's own words in the log.
define stage
@echo "$(1)"
@$(2) >> $(LOG) 2>&1 || { tail -n 25 $(LOG); echo "FAILED: $(1)"; echo "The whole log is $(LOG)"; exit 1; }
endef

.DEFAULT_GOAL := help
.PHONY: help env quickstart test test-all transformers-suite test-transformers-4 test-newest check format study study-growing bench clean distclean

help:
	@echo "make quickstart   from nothing to a small grown, saved and resumed SGT model (CPU, a few minutes)"
	@echo "make test         the test suite"
	@echo "make test-all     the test suite with every case of its matrices (layouts, kernels, formulas), by hand"
	@echo "make transformers-suite    only download transformers' own tests of models (the targets with test do it when needed)"
	@echo "make test-transformers-4   the code of exported models under the last transformers 4"
	@echo "make test-newest           what rests on Megatron-Core, under its newest version (needs Python 3.12 or newer)"
	@echo "make check        formatting, lint, types, architecture"
	@echo "make study        the paper's comparison at a size for two cores, in one table (10 minutes)"
	@echo "make study-growing         ways to grow a model, compared at equal FLOPs (12 minutes)"
	@echo "make bench        step time and FLOPs of SGT beside vanilla"
	@echo "make env          only make $(VENV) (the targets above do it when needed)"
	@echo "make format       rewrite the sources as 'make check' wants them"
	@echo "make clean        remove caches and build output; 'make distclean' removes $(VENV) too"

env: $(STAMP)

$(STAMP): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "megatron-sgt needs Python 3.10 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another one: make $(or $(MAKECMDGOALS),env) PYTHON=/path/to/python3.12"; exit 2; }
	@rm -f $(STAMP)
	@echo "[1/4] $(VENV) from $$($(PYTHON) --version)"
	@$(PY) -c 'import pip' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV) || { \
	  echo "Cannot make a virtual environment: on Debian and Ubuntu run 'apt-get install python3-venv'."; exit 2; }
	@: > $(LOG)
	$(call stage,[2/4] torch (the largest download; progress in $(LOG)),$(PIP) setuptools wheel torch)
# DeepSpeed comes as source and looks for torch while it is built: no isolation, and no operator compiled.
	$(call stage,[3/4] DeepSpeed (pure Python build),DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed)
	$(call stage,[4/4] megatron-sgt and its other dependencies,DS_BUILD_OPS=0 $(PIP) --no-build-isolation -e ".[dev]")
	@touch $@

quickstart: $(STAMP)
	@PATH="$(BIN):$$PATH" $(THREADS) bash examples/quickstart.sh

# transformers' own tests of models, which its source distributions have, of the version in $(VENV) and of the last
# transformers 4; and what they import. Nothing of it is installed. Where they cannot be had, only 'make
# transformers-suite' and .ci/run (REQUIRE_LAUNCHERS) fail: the tests that need them are skipped, and the next make
# tries again.
OLD_LIST := tests/export/hf/transformers-4.txt
SUITE := .venv-transformers-suite
SUITE_VERSIONS = $$($(PY) -c 'import transformers as t; print(t.__version__)') $$(sed -n 's/^transformers==//p' $(OLD_LIST))
DOWNLOAD = $(PY) -m pip download --disable-pip-version-check --no-input $(PIP_FLAGS) --no-deps --no-build-isolation
SUITE_NEEDED := $(filter transformers-suite,$(MAKECMDGOALS))$(REQUIRE_LAUNCHERS)

transformers-suite: $(SUITE)/.complete

$(SUITE)/.complete: constraints.txt $(OLD_LIST) | $(STAMP)
	@echo "transformers' own tests in $(SUITE)"
	@(set -e; rm -rf $(SUITE).part; \
	  $(PIP_BARE) --no-deps --target $(SUITE).part parameterized==0.9.0; \
	  for version in $(SUITE_VERSIONS); do \
	    $(DOWNLOAD) --no-binary :all: --dest $(SUITE).part transformers==$$version; \
	    mkdir $(SUITE).part/$$version; \
	    tar -xzf $(SUITE).part/transformers-$$version.tar.gz -C $(SUITE).part/$$version --strip-components 1 \
	      transformers-$$version/tests transformers-$$version/LICENSE; \
	    rm $(SUITE).part/transformers-$$version.tar.gz; \
	  done; \
	  rm -rf $(SUITE); mv $(SUITE).part $(SUITE); touch $@) >> $(LOG) 2>&1; \
	[ $$? = 0 ] || { tail -n 5 $(LOG); rm -rf $(SUITE).part; \
	  echo "They cannot be downloaded (the whole log is $(LOG)): the tests that need them are skipped."; \
	  [ -z "$(SUITE_NEEDED)" ]; }

test: $(STAMP) $(SUITE)/.complete
	@$(PYTEST) $(PYTEST_FLAGS)

test-all: $(STAMP) $(SUITE)/.complete
	@$(PYTEST) -m "" $(PYTEST_FLAGS)

# The packages of an older transformers before those of $(VENV), and nothing else.
OLD_VENV := $(VENV)-transformers-4
OLD := PYTHONPATH=$(abspath $(OLD_VENV)) $(THREADS) $(PY)

$(OLD_VENV)/.complete: $(OLD_LIST) | $(STAMP)
	@rm -rf $(OLD_VENV)
	$(call stage,transformers 4 in $(OLD_VENV),$(PIP_BARE) --no-deps --target $(OLD_VENV) -r $(OLD_LIST))
	@touch $@

test-transformers-4: $(OLD_VENV)/.complete $(SUITE)/.complete
	@$(OLD) -c 'import transformers as t; assert t.__version__.startswith("4."), t.__version__'
	@$(OLD) -m pytest -q $(PYTEST_FLAGS) tests/export/hf

# constraints.txt has the newest Megatron-Core for the Pythons that it supports. The folders that rest on it run there.
NEWEST_PYTHON ?= python3.12
NEWEST_VENV := $(VENV)-newest
NEWEST_TESTS := $(addprefix tests/,arch compat model parallel golden checkpoint engine guard \
  tools/trajectory_parts test_preflight.py)

test-newest:
	@$(NEWEST_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null || { \
	  echo "The newest Megatron-Core needs Python 3.12 or newer, which '$(NEWEST_PYTHON)' is not."; \
	  echo "Name another one: make test-newest NEWEST_PYTHON=/path/to/python3.12"; exit 2; }
	@$(MAKE) --no-print-directory env VENV=$(NEWEST_VENV) PYTHON=$(NEWEST_PYTHON)
	@$(THREADS) $(NEWEST_VENV)/bin/python -m pytest $(IN_PARALLEL) -m "not slow and not exhaustive" \
	  $(PYTEST_FLAGS) $(NEWEST_TESTS)

check: $(STAMP)
	@echo "== ruff format" && $(PY) -m ruff format --check --output-format concise . || { echo "run 'make format'"; exit 1; }
	@echo "== ruff check" && $(PY) -m ruff check --output-format concise .
	@echo "== mypy" && $(PY) -m mypy megatron_sgt integrations/vllm_sgt $(SCRIPTS)
	@echo "== architecture" && $(THREADS) $(PY) -m pytest -q tests/architecture

format: $(STAMP)
	@$(PY) -m ruff format . && $(PY) -m ruff check --fix .

study: $(STAMP)
	@PATH="$(BIN):$$PATH" $(THREADS) bash examples/study.sh

study-growing: $(STAMP)
	@PATH="$(BIN):$$PATH" $(THREADS) bash examples/study.sh --growing

bench: $(STAMP)
	@$(PY) tools/bench/step_overhead.py

clean:
	@rm -rf build dist *.egg-info integrations/*/build integrations/*/*.egg-info .pytest_cache .mypy_cache .ruff_cache
	@find . -path './.venv*' -prune -o -path ./runs -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean
	@rm -rf $(VENV) $(OLD_VENV) $(NEWEST_VENV) $(SUITE) $(SUITE).part
