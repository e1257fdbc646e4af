# `make demo` shows the package at work, `make test` runs its tests (`make test-all` the slow ones too).  Each
# target first makes a virtual environment, once.  `VENV=none` uses the current Python and installs nothing.

PYTHON ?= python3
VENV   ?= .venv
EXTRAS := cpu,gguf,plots,sweep,longbench,lm-eval,dev

ifeq ($(VENV),none)
  PY    := PYTHONPATH=$(CURDIR) $(PYTHON)
  SETUP :=
else
  PY    := $(VENV)/bin/python
  SETUP := $(VENV)/.installed
endif

.PHONY: setup demo test test-all smoke lint format kernels-check clean
.DEFAULT_GOAL := demo

setup: $(SETUP)

demo: $(SETUP)
	$(PY) -m million_cli run experiment=demo --multirun cache=dense,contiguous,paged

test: $(SETUP)
	$(PY) -m pytest tests -n 2 --ignore=tests/gpu -m "not slow"

test-all: $(SETUP)
	HYPOTHESIS_PROFILE=ci $(PY) -m pytest tests -n 2 --ignore=tests/gpu

smoke: $(SETUP)
	$(PY) -m million_cli run experiment=smoke

lint: $(SETUP)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	PYTHONPATH=. $(if $(filter none,$(VENV)),,$(VENV)/bin/)lint-imports

format: $(SETUP)
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

clean:
	rm -rf outputs multirun build dist .pytest_cache .hypothesis .ruff_cache .mypy_cache .import_linter_cache

# The stamp is written last, so that an install that broke off is repeated.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "million needs Python >= 3.11, this is %d.%d; set PYTHON=/path/to/python3" % v[:2])'
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (the first time downloads torch and friends) ..."
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

# Compiles the CUDA sources for one architecture and discards the result: needs nvcc, but no GPU.
kernels-check: $(SETUP)
	$(PY) -m million_cli.ops.build --check
