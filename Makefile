# make demo, make test: nothing else is needed on a machine with Python >= 3.11.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin
PYTEST := HF_HUB_OFFLINE=1 $(RUN)/python -m pytest
export OMP_NUM_THREADS ?= 1
DEMO ?= outputs/demo
STAMP := $(VENV)/.installed

.PHONY: help demo test test-all debian slurm check smoke bench bench-gpu bench-compare format clean

help: ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "kv-align needs Python 3.11 or newer: name one with make PYTHON=...")'
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --upgrade pip
	$(RUN)/python -m pip install --quiet --constraint constraints.txt torch
	$(RUN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: $(STAMP) ## flat, structured and none, three seeds, on the embedded pair: plan, queue, runs, report; minutes
	$(RUN)/python -m launch submit sweep=demo cluster=local output_dir=$(DEMO) --wait

# Slurm's tests mostly wait for Slurm, so they run beside the others.
define run_tests
@log=$$(mktemp); trap 'kill $$slurm 2>/dev/null' INT TERM; \
$(PYTEST) $(1) --numprocesses 2 --dist loadfile --no-loadscope-reorder tests/slurm > $$log 2>&1 & slurm=$$!; \
$(PYTEST) $(1) --numprocesses 2 --dist loadfile --no-loadscope-reorder --ignore tests/slurm; status=$$?; \
wait $$slurm || status=$$?; cat $$log; rm -f $$log; exit $$status
endef

test: $(STAMP) ## all tests but the exhaustive ones; those on a real Slurm and in a browser only where these are (make debian)
	$(call run_tests)

test-all: $(STAMP) ## the exhaustive tests too: every family, every cell, the full simulations; about an hour
	$(call run_tests,-m "slow or not slow")

debian: ## install what the tests of Slurm and of the report page need, from Debian
	apt-get update -q
	DEBIAN_FRONTEND=noninteractive apt-get install -y -q slurm-wlm munge slurmdbd mariadb-server chromium chromium-driver

slurm: $(STAMP) debian ## the tests on a real Slurm, which is started and ended here
	KV_ALIGN_REQUIRE_SLURM=1 $(PYTEST) tests/slurm

check: $(STAMP) ## lint, format and strict types
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

smoke: $(STAMP) ## both aligners, ten steps: shapes, and that everything is finite
	$(RUN)/python -m kv_align.profile aligner=flat loss=kv+struct --steps 10
	$(RUN)/python -m kv_align.profile aligner=structured loss=kv+struct --steps 10

bench: $(STAMP) ## what a step and a sweep cost in time and memory, beside the floor and beside what others do
	$(RUN)/python -c 'import trl' 2>/dev/null || $(RUN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(RUN)/python -m tests.benchmarks.bench_step

bench-gpu: $(STAMP) ## on one GPU, in eight minutes: steps of a large pair, small runs at once, filling a cache
	$(RUN)/python -m tests.benchmarks.bench_gpu

bench-compare: $(STAMP) ## numbers of two benchmarks side by side: A=one.json B=other.json
	$(RUN)/python -m tests.benchmarks.compare $(A) $(B)

format: $(STAMP) ## let ruff write the code as check wants it
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

clean: ## remove the environment
	rm -rf $(VENV)
