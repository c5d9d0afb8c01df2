# make demo    install into .venv, then run `omnimerge demo`
# make test    the tests; make check: format, lint, types, import contracts, docs
# make soak    2,000 merges that are killed (KILLS), 2,000 with faults (FAULTS), an hour of fuzzing (MINUTES)
# Everything is installed from constraints.txt, which pins the versions that were tested.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
export HF_HUB_OFFLINE ?= 1
# What builds the package is pinned too: by the one before pip 25.3, by the other since.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt

.PHONY: demo test check docs bench soak clean

demo: $(VENV)/.installed
	$(BIN)/omnimerge demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -n auto

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check src tests tools benchmarks examples
	$(BIN)/ruff check src tests tools benchmarks examples
	$(BIN)/pydoclint --quiet src
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/docs.py --check
	$(BIN)/mkdocs build --quiet --strict --site-dir build/site

docs: $(VENV)/.installed-dev
	$(BIN)/python tools/docs.py
	$(BIN)/mkdocs build --quiet --strict --site-dir build/site

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/merge.py

soak: export OMNIMERGE_SOAK := 1
soak: export OMNIMERGE_KILLS := $(or $(KILLS),2000)
soak: export OMNIMERGE_FAULTS := $(or $(FAULTS),2000)
soak: export OMNIMERGE_MINUTES := $(or $(MINUTES),60)
soak: $(VENV)/.installed-dev
	-$(PIP) "atheris>=2.3"
	$(BIN)/python -m pytest -q -s -m soak tests/engine/test_resume.py tests/engine/test_faults.py tests/fuzz/test_fuzz.py

clean:
	rm -rf $(VENV) build omnimerge-demo benchmarks/scratch

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e ".[dev]"
	touch $@
