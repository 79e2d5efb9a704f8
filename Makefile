# `make demo` and `make test` each set up what they need, once: a Python from 3.11 to 3.13 is found
# (or named: make demo PYTHON=/path/to/python3.12) and everything goes into .venv.

VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
PYTHON ?=
JOBS ?= 2
PYTEST_ARGS ?=
# Another active environment, or one that sends installs elsewhere, must not leak into ours.
unexport PYTHONPATH PYTHONHOME PYTHONSTARTUP VIRTUAL_ENV CONDA_PREFIX PIP_TARGET PIP_PREFIX
export PYTHONNOUSERSITE := 1
export PIP_USER := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

SUITABLE := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
PIP_INSTALL := $(PY) -m pip install --constraint constraints.txt --editable
UV_COMPILE := .venv-lock/bin/uv --quiet pip compile pyproject.toml --universal --python-version 3.11 \
	--fork-strategy fewest --custom-compile-command "make lock"
# Snakemake from 9.16 on holds packaging below 26, and nilearn from 0.14 on needs 26: the newer nilearn is wanted.
PREFERRED := nilearn>=0.14
COMMA := ,
# Workers share the cores already, so each keeps to one thread.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

.DELETE_ON_ERROR:
.PHONY: help demo test test-code test-wheel setup setup-dev lint docs lock clean

help:  ## Say what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.ready  ## Run the demonstration, from recordings to a report
	$(BIN)/brainalign demo

test: test-code test-wheel  ## Run the tests, then those of the built wheel outside the checkout

test-code: $(VENV)/.ready
	$(ONE_THREAD) $(PY) -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

test-wheel: $(VENV)/.ready
	$(ONE_THREAD) bash tests/wheel.sh $(PY)

setup: $(VENV)/.ready  ## Make .venv with every extra

setup-dev: $(VENV)/.ready-dev  ## Make .venv with the linters and the documentation's tools too

lint: $(VENV)/.ready-dev  ## Check style, format, types and the order of imports
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(BIN)/lint-imports

docs: $(VENV)/.ready-dev  ## Build the documentation; a warning is an error
	$(PY) -m sphinx -W --keep-going -b html docs docs/_build/html

lock: $(PY)  ## Choose versions anew: constraints.txt, and requirements.lock with hashes
	test -x .venv-lock/bin/uv || { $(PY) -m venv .venv-lock && .venv-lock/bin/python -m pip install uv; }
	echo '$(PREFERRED)' > .venv-lock/preferred.txt
	$(UV_COMPILE) --all-extras --no-annotate -c .venv-lock/preferred.txt > .venv-lock/universal.txt
	sed 's/ ;.*//' .venv-lock/universal.txt > .venv-lock/constraints.txt
	$(UV_COMPILE) --extra all --generate-hashes --no-annotate -c .venv-lock/constraints.txt > .venv-lock/requirements.lock
	mv .venv-lock/constraints.txt constraints.txt
	mv .venv-lock/requirements.lock requirements.lock

clean:  ## Remove .venv and what was built; results/ stays
	rm -rf $(VENV) .venv-lock build dist docs/_build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

$(PY):
	@found=; \
	for python in $(if $(PYTHON),"$(PYTHON)",python3 python3.13 python3.12 python3.11 python); do \
	  if "$$python" -c '$(SUITABLE)' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "No Python from 3.11 to 3.13 with venv and pip: looked for $(or $(PYTHON),python3.13$(COMMA) 3.12$(COMMA) 3.11)." >&2; \
	  echo "Install one (on Debian or Ubuntu: apt-get install python3 python3-venv)" >&2; \
	  echo "or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; \
	  exit 1; \
	fi; \
	echo "Making $(VENV) with $$("$$found" --version)"; \
	"$$found" -m venv --clear $(VENV)

$(VENV)/.ready: pyproject.toml constraints.txt | $(PY)
	@echo "Installing into $(VENV): the first time takes minutes and about 7 GB of disk"
	$(PIP_INSTALL) '.[all]'
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(PIP_INSTALL) '.[all,lint,docs]'
	@touch $@
