# Needs Python 3.10 or newer with pip and venv, make, and a C++ compiler; .venv gets all the rest.
#
#   make demo     train the two-level demo and write its pictures to demo-output/
#   make test     run the tests (one part of them: make test TESTS=tests/ops)
#   make static   the checks of the GPU kernels' machine code, with the oldest Triton supported
#   make bench    measure beside all rivals and write the README's tables: a quarter of an hour
#   make lint     ruff and clang-format
#   make types    mypy
#   make format   let ruff and clang-format rewrite the sources
#   make clean    remove .venv and everything built; demo-output/ and runs/ stay
#
# `make PYTHON=python3.12 …` chooses the Python that .venv is made from.

PYTHON ?= python3
TESTS ?=
BIN := .venv/bin
# `make test` checks with the Triton in .venv, the newest that PyTorch allows.
OLDEST_TRITON := 3.6.0
# Two threads, so that a test run leaves the rest of a large machine alone.
export OMP_NUM_THREADS ?= 2

INSTALL_INPUTS := pyproject.toml setup.py constraints.txt $(wildcard kernels/cpu/*)
CPP_SOURCES := $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h tests/kernels/*.cpp tests/kernels/*.h)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test static bench lint types format clean

help:
	@sed -n '3,10s/^#   //p' Makefile

demo: .venv/installed-demo
	$(BIN)/fastvq demo --out demo-output

test: .venv/installed-test
	$(BIN)/python -m pytest $(TESTS)

static: .venv/installed-test .venv/triton-$(OLDEST_TRITON)
	PYTHONPATH=.venv/triton-$(OLDEST_TRITON) \
		$(BIN)/python -m pytest tests/kernels/triton/test_machine_code.py

bench: .venv/installed-bench
	$(BIN)/python -m benchmarks.record

lint: .venv/installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)

# The libraries that the code calls bring types that mypy reads.
types: .venv/installed-test .venv/installed-lint
	$(BIN)/mypy

format: .venv/installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES)

clean:
	rm -rf .venv build dist *.egg-info _fastvq_C*.so .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find fastvq kernels benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "fastvq: PYTHON must be Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Use make PYTHON=python3.12 …" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet "pip>=22"
	touch $@

# The package with one of its extras, editable, so that the checkout itself is tested and run. The
# environment variables carry the constraints into pip's isolated build environment as well.
.venv/installed-%: .venv/created $(INSTALL_INPUTS)
	PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
		$(BIN)/python -m pip install --disable-pip-version-check --editable '.[$*]'
	@$(BIN)/python -c 'import _fastvq_C' || \
		echo 'fastvq: the C++ kernels were not built; `$(BIN)/pip install -v -e .` says why.' >&2
	touch $@

.venv/triton-%: .venv/created
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --target $@ triton==$*
