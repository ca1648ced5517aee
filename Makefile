# make demo                                 install, then sample a grid with and without the cache
# make demo ARGS="--num-sampling-steps 10"  the same with extra flags; a later flag wins over an earlier one
# make test | lint | install | clean
# PYTHON picks the interpreter that creates .venv, e.g. make install PYTHON=python3.12

PYTHON ?= python3
ARGS =

BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install demo test lint clean

install: $(STAMP)

# A venv without a working pip is an interrupted one: making it again repairs it.
$(STAMP): pyproject.toml
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -e ".[dev]"
	touch $@

demo: install
	$(BIN)/python sample.py --adacorr --compare --out samples/demo.png --record samples/demo.json $(ARGS)

# A process for each core; one that has nothing left takes over tests of the other.
test: install
	$(BIN)/python -m pytest -q -n auto --dist worksteal $(ARGS)

lint: install
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

# Leaves .venv and samples/ alone.
clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
