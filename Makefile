# make lab        set up if needed, open the course
# make test       set up if needed, run every check
# make notebooks  build and execute what is stale        make audit  prove the exercises
# make bench      measure, write BENCHMARKS.md           make setup  only set up
# make test-attacks  every attack on the grader; make test runs those that are quick
#
# PYTHON=python3.12 chooses the interpreter of .venv. Written for GNU make 3.81, which macOS carries; the commands
# name no path outside this folder, so its own path may contain spaces.

PYTHON ?= python3
PY     := .venv/bin/python
STAMP  := .venv/.installed
# torch is installed first and alone, so that a CPU build chosen by hand (README, "CPU only") stays.
TORCH  := $(shell grep '^torch==' constraints.txt)
# The same seeds each time: what passed here passes there. make audit draws fresh ones.
AUDIT  ?= --sample --mutants 4
SEED   ?= 0
LAB    ?=
# Side by side, with one thread each, or they wait for each other's. loadgroup, without groups (which xdist 3.8 does not
# see under pytest 9.2), hands out test by test; loadfile keeps a notebook's cells together.
PYTEST ?= -n auto --maxprocesses 4
# Stock nbgrader over every lesson and every mutant of the specimens wait for .ci/run (SLOW=), as most of the audit.
SLOW   ?= and not slow
NOTEBOOKS = $(wildcard solutions/*/*.ipynb)
# A learner's ways through JupyterLab; .ci/run adds Run All of every lesson (BROWSER=tests/browser).
BROWSER ?= $(wildcard tests/browser/test_lesson.py tests/browser/test_interview.py)

# The stamp holds the folder it was made in: an editable install breaks when the folder is moved.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif
.PHONY: setup lab test test-attacks notebooks audit bench

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; (3, 11) <= v < (3, 14) or sys.exit("expected Python 3.11 to 3.13, found %d.%d; run: make PYTHON=python3.12" % v[:2])'
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "expected Python with venv, found none; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@echo "== Setting up .venv (once; some minutes and 2 GB)"
	@rm -f $(STAMP)
	$(PYTHON) -m venv .venv
	$(PY) -m pip install "$(TORCH)"
	$(PY) -m pip install --no-build-isolation -c constraints.txt -e '.[dev]'
	@printf '%s\n' "$(CURDIR)" > $(STAMP)

lab: $(STAMP)
	@$(PY) -m llmcourse.cli lab $(LAB)

test: $(STAMP)
	@echo "== ruff check"
	@$(PY) -m ruff check .
	@echo "== ruff format --check"
	@$(PY) -m ruff format --check .
	@echo "== mypy"
	@$(PY) -m mypy
	@echo "== pytest: tests, doctests"
	@OMP_NUM_THREADS=1 $(PY) -m pytest $(PYTEST) --dist loadgroup -m "not browser $(SLOW)" tests llmcourse
ifneq ($(NOTEBOOKS),)
	@echo "== nbval: the solution notebooks run, and print again what they are marked for"
	@LLMCOURSE_SEED=0 OMP_NUM_THREADS=1 $(PY) -m pytest $(PYTEST) --dist loadfile --nbval-lax $(NOTEBOOKS)
endif
	@echo "== audit $(AUDIT) --seed $(SEED)"
	@$(PY) -m llmcourse.cli audit $(AUDIT) --seed $(SEED)
	@echo "== notebooks are built from their sources"
	@$(PY) -m llmcourse.notebook --check
ifneq ($(BROWSER),)
	@echo "== pytest: JupyterLab in a browser"
	@$(PY) -m pytest -m browser $(BROWSER)
endif
	@echo "== all passed"

test-attacks: $(STAMP)
	@$(PY) -m pytest -m attack tests/attacks

notebooks: $(STAMP)
	@$(PY) -m llmcourse.notebook

audit: $(STAMP)
	@$(PY) -m llmcourse.cli audit

bench: $(STAMP)
	@$(PY) -m llmcourse.benchmarks
