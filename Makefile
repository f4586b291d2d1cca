# make demo, make test: nothing else is needed on a machine with Python >= 3.11.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
DEMO ?= outputs/demo
STAMP := $(VENV)/.installed

.PHONY: help demo test debian slurm check smoke bench format clean

help: ## what can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "kv-align needs Python 3.11 or newer: name one with make PYTHON=...")'
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --upgrade pip
	$(RUN)/python -m pip install --quiet --constraint constraints.txt torch
	$(RUN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: $(STAMP) ## flat, structured and none, three seeds, on the embedded pair: plan, queue, runs, report; minutes
	$(RUN)/python -m launch submit sweep=demo cluster=local output_dir=$(DEMO) --wait

test: $(STAMP) ## all tests; those on a real Slurm and in a browser only where these are (make debian)
	HF_HUB_OFFLINE=1 $(RUN)/python -m pytest --numprocesses 2 --ignore tests/slurm
	HF_HUB_OFFLINE=1 $(RUN)/python -m pytest tests/slurm

debian: ## install what the tests of Slurm and of the report page need, from Debian
	apt-get update -q
	DEBIAN_FRONTEND=noninteractive apt-get install -y -q slurm-wlm munge slurmdbd mariadb-server chromium chromium-driver

slurm: $(STAMP) debian ## the tests on a real Slurm, which is started and ended here
	HF_HUB_OFFLINE=1 KV_ALIGN_REQUIRE_SLURM=1 $(RUN)/python -m pytest tests/slurm

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

format: $(STAMP) ## let ruff write the code as check wants it
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

clean: ## remove the environment
	rm -rf $(VENV)
