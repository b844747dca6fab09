# Two commands: `make demo` and `make test`. Both set everything up in .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all soak bench lint clean install

install: .venv/installed

.venv/installed: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "tandem needs Python 3.11, 3.12 or 3.13: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

# Text, SFT, DPO, generation and a report, on this machine's CPU.
demo: install
	$(BIN)/tandem run configs/letters/recipe.yaml

# Style, types, import directions, and every test that this machine can run in ten minutes: files side by side.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow' -n auto --maxprocesses 4 --dist loadfile

# What `make test` leaves out for time, too.
test-all: lint
	$(BIN)/python -m pytest

# SIGTERM and SIGUSR1 at random moments to two ranks, SOAK times each; goes on where it was interrupted.
SOAK ?= 100
soak: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak.soak --count $(SOAK) --folder runs/soak

# Speed and memory beside TRL's, on this machine; a table, and a picture beside the results.
BENCH ?= runs/bench-$(shell date +%Y%m%d-%H%M%S)
bench: install
	$(BIN)/tandem bench --output $(BENCH).json --picture $(BENCH).png

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv runs
