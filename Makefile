# `make` prints what there is. One environment, .venv, serves every target and is rebuilt only when setup.py changes.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help env demo test test-fast test-oldest soak lint docs bench gpu gpu-first gpu-test gpu-races gpu-bench clean

TORCH := torch==2.13.0
PY := .venv/bin/python
STAMP := .venv/.triax-installed

# A machine with a GPU may have a torch of its own, and no network to build .venv over: the first Python here whose torch
# sees a GPU is taken, and nothing is built. PY=... names another. `make gpu` has looked once for all its steps (GPU_PY).
GPU_PYTHONS := $(if $(filter-out .venv/bin/python,$(PY)),$(PY),.venv/bin/python python3)
NO_GPU = echo "make $@: no torch that sees a CUDA GPU here, nothing was run"; exit 0
FIND_GPU = py="$(GPU_PY)"; for one in $(GPU_PYTHONS); do \
	  if [ -z "$$py" ] && "$$one" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null; then py="$$one"; fi; \
	done; if [ -z "$$py" ]; then $(NO_GPU); fi; $(if $(SAVE),mkdir -p '$(SAVE)',:)
# SAVE=DIR: results and everything said go there, and nothing is written beside the benchmarks.
LOG = $(if $(SAVE),2>&1 | tee -a '$(SAVE)/gpu.log')
STEPS ?= first test bench races
JOBS ?= 2
# A file's tests stay in one process: they share what its fixtures make.
BESIDE := -n $(JOBS) --dist loadfile --no-loadscope-reorder
NAMED := $(if $(ONLY),--only $(ONLY))

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: $(STAMP)  ## build .venv: torch, this package (editable), test and lint extras
	@echo ".venv is ready: $$($(PY) --version)"

demo: $(STAMP)  ## the whole chain on this machine: text, tokenizer, pretraining, Hugging Face, tuning, samples
	@$(PY) examples/demo.py

test: $(STAMP)  ## the whole test suite but for soak
	@$(PY) -m pytest -m "not soak" $(BESIDE)

test-fast: $(STAMP)  ## the suite without its slow part
	@$(PY) -m pytest -m "not slow and not soak" $(BESIDE)

soak: $(STAMP)  ## kills, hangs and mutations that take minutes
	@$(PY) -m pytest -m soak

# Fused kernels support Triton 3.6 and later; .venv has the newest. numpy 2.4 breaks the interpreter of 3.6.0 alone.
test-oldest: $(STAMP)  ## the tests of the kernels on the oldest Triton
	@[ -d .venv/oldest/triton ] || $(PY) -m pip install --quiet --no-deps --target .venv/oldest triton==3.6.0 'numpy<2.4'
	@PYTHONPATH=.venv/oldest $(PY) -m pytest tests/kernels

lint: $(STAMP)  ## ruff, mypy, and the shell of the examples
	@$(PY) -m ruff check .
	@$(PY) -m mypy
	@if compgen -G 'kernels/*.py' > /dev/null; then $(PY) -m mypy kernels; fi
	@for f in examples/*.sh .ci/run; do bash -n "$$f"; done
	@if command -v shellcheck > /dev/null; then shellcheck .ci/run examples/*.sh; else echo "shellcheck is not here: shell checked by bash -n only"; fi

docs: $(STAMP)  ## write the generated regions of README.md and docs/
	@$(PY) docs/generate.py

bench: $(STAMP)  ## every benchmark; results as JSON beside them
	@for f in benchmarks/*.py; do echo "== $$f"; $(PY) "$$f" || [ $$? -eq 2 ]; done  # 2: it cannot run here, and said so

gpu:  ## on a CUDA GPU the four steps below, each whatever became of the last; SAVE=DIR, JOBS=10, PEERS=eager,sdpa, STEPS="first test"
	@$(FIND_GPU); failed=; for step in $(STEPS); do \
	  echo "== make gpu-$$step, by $$py"; $(MAKE) --no-print-directory gpu-$$step GPU_PY="$$py" || failed="$$failed gpu-$$step"; \
	done; if [ -n "$$failed" ]; then echo "make gpu: failed:$$failed" $(LOG); exit 1; fi; echo "make gpu: nothing failed" $(LOG)

gpu-first:  ## the first minutes on a new GPU: every kernel, a step by Triton and by torch, the 7B step
	@$(FIND_GPU); "$$py" -u benchmarks/first_run.py $(if $(SAVE),--save '$(SAVE)') $(LOG)

gpu-test:  ## the tests of the kernels that need a GPU, compiled for this one
	@$(FIND_GPU); "$$py" -c 'import xdist' 2> /dev/null && beside="-n $(JOBS) --dist worksteal" || beside=; \
	"$$py" -u -m pytest tests/kernels -m gpu $$beside $(LOG)

gpu-bench:  ## each kernel beside its peers; ONLY="norm rope" picks, and goes on after a call that ran out of time
	@$(FIND_GPU); "$$py" -u benchmarks/kernels.py --save $(if $(SAVE),'$(SAVE)') $(NAMED) $(if $(PEERS),--peers '$(PEERS)') \
	  $(if $(ROUNDS),--rounds $(ROUNDS)) $(LOG)

gpu-races:  ## each kernel once, on few rows, under compute-sanitizer's memcheck and racecheck
	@$(FIND_GPU); "$$py" -u benchmarks/sanitize.py $(NAMED) $(LOG)

clean:  ## remove .venv, caches and what the demo made
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and pinned, so that the demo and the golden numbers are those of one version; the rest by range.
$(STAMP): setup.py
	@for p in python3.12 python3.11 python3; do \
	  if $$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then found=$$p; break; fi; \
	done; \
	if [ -z "$${found:-}" ]; then \
	  echo "error: Triax needs Python 3.11 or newer with venv; python3 here is $$(python3 --version 2> /dev/null || echo absent)." \
	       "Install python3.11 or python3.12 (on Debian and Ubuntu also python3.12-venv)." >&2; exit 2; \
	fi; \
	$(PY) -m pip --version > /dev/null 2>&1 || { echo "building .venv with $$($$found --version)"; $$found -m venv --clear .venv; }
	@$(PY) -m pip install "$(TORCH)"
	@echo "installing triax and its extras test and lint"; $(PY) -m pip install --quiet -e '.[test,lint]'
	@touch $@
