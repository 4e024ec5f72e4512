# make run     the embedded ladder, from nothing to an aligned model      make check   style, types, fast tests
# make test    everything that CI runs                                    make bench   side-by-side measurements
# make load    long fault and load runs                                   make clean   the environment and caches (runs/ stays)
VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
RUN_ARGS ?=
BENCH_ARGS ?=
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE ?= 1

.PHONY: run test check bench load clean install

run: $(STAMP)
	$(PY) -m temper run recipes/harbour.yaml --out runs/harbour $(RUN_ARGS)

test: check
	$(PY) -m pytest -n 2 -m "slow and not load"

check: $(DEV)
	$(PY) -m ruff check src tests bench
	$(PY) -m ruff format --check src tests bench
	$(PY) -m mypy
	$(PY) -m pytest -n 2 -m "not slow and not load"

load: $(DEV)
	$(PY) -m pytest -m load

bench: $(STAMP)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(PY) -m bench $(BENCH_ARGS)

install: $(DEV)

$(STAMP): pyproject.toml constraints.txt
	test -x $(PY) || python3 -m venv $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(DEV): $(STAMP)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build src/*.egg-info
