# `make` lists the targets.
.DEFAULT_GOAL := help
PYTHON ?= python3
OUT ?= demo
JOBS ?= 2
BIN := .venv/bin
STAMP := .venv/.installed

export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install demo test check fix docs bench faults

help: ## list the targets
	@awk 'BEGIN { FS = ":.*## " } /^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## create .venv with the tested packages (other targets do it if it is missing)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, this is " + sys.version.split()[0] + "; name another: make install PYTHON=python3.12")'
	@echo "installing into .venv (some minutes the first time; torch is the large one)"
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq -c constraints.txt torch==2.13.0
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev,demo,docs]'
	@touch $@

demo: $(STAMP) ## run everything, from pairs to report, on the embedded teacher (OUT=demo)
	$(BIN)/diffusion2gan demo --out $(OUT)

test: $(STAMP) ## run the tests, without the slow ones (JOBS=2 processes)
	$(BIN)/pytest -n $(JOBS) --dist loadfile -m "not slow"

check: $(STAMP) ## check lint, format and types, without changing a file
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src

fix: $(STAMP) ## fix lint and format where possible
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP) ## build the documentation site (open site/index.html)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(STAMP) ## run every benchmark; each prints a table
	@found=; for file in benchmarks/*.py; do \
	  test -e "$$file" || continue; found=1; echo "== $$file"; $(BIN)/python "$$file" || exit 1; \
	done; test -n "$$found" || echo "no benchmarks yet"

faults: $(STAMP) ## run the fault campaign, for hours: 100 rounds of kills per job (ROUNDS=100)
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/campaign.py --rounds $(or $(ROUNDS),100)
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/others.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/fuzz.py
