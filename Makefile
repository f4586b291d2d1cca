# make demo, make test: nothing else is needed on a machine with Python >= 3.11.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
DEMO ?= outputs/demo
STAMP := $(VENV)/.installed

.PHONY: help demo test slurm check smoke bench format clean

help: ## what can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "kv-align needs Python 3.11 or newer: name one with make PYTHON=...")'
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --upgrade pip
	$(RUN)/python -m pip install --quiet --constraint constraints.txt torch
	$(RUN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: $(STAMP) ## flat, structured and none, three seeds, on the embedded pair; minutes on one core
	$(RUN)/python -m kv_align.train --multirun experiment=baseline,v4_0_2,none seed=0,1,2 \
		trainer.max_steps=150 trainer.warmup_steps=15 hydra.sweep.dir=$(DEMO)
	$(RUN)/python -m kv_align.summary $(DEMO)

test: $(STAMP) ## all tests but those on a real Slurm (make slurm): the launcher is not finished
	HF_HUB_OFFLINE=1 $(RUN)/python -m pytest --numprocesses 2 --ignore tests/slurm

slurm: $(STAMP) ## install Debian's Slurm and run the tests that need one
	apt-get update -q && apt-get install -y -q slurm-wlm munge slurmdbd mariadb-server
	KV_ALIGN_REQUIRE_SLURM=1 $(RUN)/python -m pytest tests/slurm

check: $(STAMP) ## lint, format and strict types
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

smoke: $(STAMP) ## both aligners, ten steps: shapes, and that everything is finite
	$(RUN)/python -m kv_align.profile aligner=flat loss=kv+struct --steps 10
	$(RUN)/python -m kv_align.profile aligner=structured loss=kv+struct --steps 10

bench: $(STAMP) ## what a step costs beside the floor
	$(RUN)/python -m tests.benchmarks.bench_step

format: $(STAMP) ## let ruff write the code as check wants it
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

clean: ## remove the environment
	rm -rf $(VENV)
