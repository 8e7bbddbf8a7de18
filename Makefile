# Two commands do all: `make demo` shows the product, `make test` proves it. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORES := $(shell nproc 2>/dev/null || echo 2)
EXTRAS ?= dev
export OMP_NUM_THREADS ?= $(CORES)
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE ?= 1

BASE ?= HEAD~1
.PHONY: help setup demo test test-fast pages real check same mutate tables clean

help:
	@echo "make demo    set up and run the sweep on the embedded model; ends with the path of the report"
	@echo "make test    set up and run the whole test suite (offline)"
	@echo "make test-fast  the tests of the rooms that everything stands on, in a minute"
	@echo "make pages   the tests of studies and benchmarks, and whether their pages say what their rows say"
	@echo "make real    set up, fetch SmolLM2-135M-Instruct and run the tests on it (10 minutes)"
	@echo "make check   ruff, the type checker and the import directions"
	@echo "make tables  write down anew what tensormix list shows, after a method or operator is added"
	@echo "make mutate  break what changed since BASE=$(BASE), one thing at a time, and list what no test notices"
	@echo "make families  try every feature on every class of transformers (half an hour; goes on where it stopped)"
	@echo "make same    compare what the working tree makes with what a commit made (BASE=$(BASE)), to the bit"

setup: $(VENV)/.ready

# The constraints pin every version; without the pin of torch a machine without GPU downloads gigabytes of CUDA packages.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "tensormix needs Python 3.11 or newer"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

demo: setup
	$(BIN)/tensormix demo --out runs/demo

test: setup
	$(BIN)/python -m pytest -q

# The rooms that everything stands on: a minute of one core, for every small change.
FAST := $(addprefix tests/,test_plan.py test_architecture.py fitting operators kernels data storage recipe sites exam)

test-fast: setup
	$(BIN)/python -m pytest -q $(FAST)

# A process for each folder: scripts of two studies may have one name.
pages: setup
	for folder in benchmarks $(sort $(dir $(wildcard studies/*/test_*.py))); do $(BIN)/python -m pytest -q $$folder || exit 1; done

real: setup
	$(BIN)/python -W ignore tools/smollm2.py build/smollm2
	TENSORMIX_REAL=$(CURDIR)/build/smollm2 TENSORMIX_REAL_GGUF=$(CURDIR)/build/smollm2.gguf $(BIN)/python -m pytest -q tests/real

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/test_architecture.py

tables: setup
	$(BIN)/python tools/tables.py

mutate: setup
	OMP_NUM_THREADS=1 $(BIN)/python tools/mutate.py --base $(BASE) --load torch,transformers.trainer,transformers.models.qwen3

same: setup
	$(BIN)/python tools/same.py $(BASE)

# One thread: the models are tiny. AGAIN=--again tries once more what has a row.
families: setup
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore tools/families $(KINDS) $(AGAIN)

clean:
	rm -rf runs build dist *.egg-info
