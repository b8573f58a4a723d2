# make demo    the main job on a small poisoned submission, measured against the truth
# make test    the test suite
# make check   ruff and mypy
# make ui      Prefect's pages with the runs of `make demo`, on this machine alone
# Each makes .venv and installs into it when it is needed.

PYTHON ?= python3
OUT ?= demo
BIN := .venv/bin

# The model workers set their own number of threads; more of them elsewhere only fight for the cores.
export OMP_NUM_THREADS ?= 1
export PREFECT_HOME ?= $(CURDIR)/.prefect

.PHONY: demo test check ui clean
.DELETE_ON_ERROR:

demo: .venv/.installed
	$(BIN)/byesight demo --out $(OUT)

test: .venv/.installed
	$(BIN)/python -m pytest

check: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy byesight.py

ui: .venv/.installed
	PREFECT_SERVER_UI_V2_ENABLED=false PREFECT_SERVER_ANALYTICS_ENABLED=false DO_NOT_TRACK=1 $(BIN)/prefect server start --host 127.0.0.1

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed; name one with PYTHON=...") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
