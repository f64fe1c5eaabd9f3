# Two commands do everything on a fresh machine with Python >= 3.11: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_OUT ?= runs/demo

.PHONY: setup demo test lint unit integration test-wheel chaos test-chaos fuzz test-fuzz soak test-docker proto docs bench clean

setup: $(VENV)/.installed

# torch first: resolved together with torchvision, pip may choose another build of it. The constraints pin all versions.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Espalier needs Python >= 3.11; run make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cloud,testbed,dev]'
	@touch $@

demo: setup
	$(BIN)/espalier demo --method fedphd --edges 2 --clients 4 --data digits --out $(DEMO_OUT)

test: lint docs unit test-wheel integration chaos fuzz

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/lint-imports tests/repo/edge_imports.toml

# The site, in build/site; a link, an anchor or a name that does not resolve is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# One worker a core and one thread a worker.
unit: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests/unit tests/repo

# The wheel, built and installed into environments of their own, and a tree that trains in them.
test-wheel: setup
	$(BIN)/python -m pytest tests/wheel

# A file's tests share a tree of processes, so a file stays on one worker. They wait for one another much of the time.
integration: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests/integration

# Two schedules here; `make test-chaos` runs CHAOS of them from CHAOS_FROM on, or the CHAOS_SEED that failed, alone.
chaos: setup
	$(BIN)/python -m pytest tests/chaos

CHAOS ?= 50
test-chaos: setup
	CHAOS=$(CHAOS) CHAOS_FROM=$(or $(CHAOS_FROM),1) CHAOS_SEED=$(CHAOS_SEED) $(BIN)/python -m pytest tests/chaos

# A few hundred mutated messages here; `make test-fuzz` throws FUZZ of them, other ones with another FUZZ_SEED.
fuzz: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/fuzz

FUZZ ?= 10000
test-fuzz: setup
	OMP_NUM_THREADS=1 FUZZ=$(FUZZ) FUZZ_SEED=$(FUZZ_SEED) $(BIN)/python -m pytest -s --timeout=1800 tests/fuzz

soak: setup
	$(BIN)/python -m tests.chaos.soak --windows 200

# Needs docker and some minutes, and no Python environment; see docs/docker.md.
test-docker:
	$(PYTHON) docker/check.py

# Whole runs, one after the other; they need the machine for themselves. `make bench BENCHES=overhead` runs one.
BENCHES ?= overhead payload aggregate window bytes train memory scale start security
bench: setup
	for name in $(BENCHES); do $(BIN)/python -m bench.$$name --out runs/bench || exit 1; done

proto: setup
	$(BIN)/python -m espalier_proto.generate

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
