# One verb per task; each sets up .venv by itself and says what it does. `make` alone lists them.
#   PYTHON=/path/to/python3.12 make demo    use this interpreter instead of the one found

SHELL := /bin/bash
SETUP := $(or $(shell command -v python3),$(shell command -v python3.12),$(shell command -v python3.11),$(shell command -v python))
BIN := .venv/bin
# One thread per process: two torch threads on a shared pair of cores are slower than one (facts measured it).
export OMP_NUM_THREADS ?= 1
export PYTHONUNBUFFERED := 1
# A start reads some 150 of our modules: without their bytecode each process compiles them anew, a second of a core.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo serve test check bench peers venv venv-dev venv-train clean

help:
	@echo "make demo    a caller dials the agent over SIP on this machine, and you read along"
	@echo "make serve   the agent and the supervisors' page, until Ctrl-C"
	@echo "make test    every test (live ones are skipped where their peer is missing)"
	@echo "make check   format, lint, types, architecture, fast tests, size of the tree"
	@echo "make bench   real-time factors of the model, frame gaps of the media"
	@echo "make peers   install the test peers: baresip, SIPp, sipsak, Kamailio, coturn, chromium, PostgreSQL (needs root)"

demo: venv
	@$(BIN)/minmo demo

serve: venv
	@$(BIN)/minmo serve

LIVE = $(shell grep -rl "mark.live" tests --include="test_*.py")
# A machine shared with others may starve one of four tests at a time: what failed is tried once more, alone, and that is
# told. $(1): which tests, $(2): how they are dealt out.
define tested
{ $(BIN)/python -m pytest $(1) $(2) || { [ $$? = 1 ] && echo "make test: what failed is tried once more, alone" && \
  $(BIN)/python -m pytest $(1) --last-failed --last-failed-no-failures none; }; }
endef
test: venv-dev
# Calls are mostly waiting: more at a time than there are cores, live ones in groups (tests/conftest.py).
	@failed=0; \
	$(call tested,-m "not live",-n 4 --dist worksteal) || failed=1; \
	$(call tested,$(LIVE) -m live,-n 4 --dist loadfile --no-loadscope-reorder) || failed=1; \
	exit $$failed

check: venv-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python scripts/check_sizes.py
	$(BIN)/python -m pytest -q -m "not live and not slow"

bench: venv
	@$(BIN)/minmo bench

peers:
	apt-get update
	apt-get install -y --no-install-recommends baresip-core sip-tester sipsak kamailio kamailio-tls-modules coturn chromium fonts-liberation postgresql libspeexdsp1

venv venv-dev venv-train: setup_python
	@$(SETUP) scripts/setup_venv.py $(if $(filter venv,$@),run,$(subst venv-,,$@))

.PHONY: setup_python
setup_python:
	@test -n "$(SETUP)" && $(SETUP) -c 'import sys; sys.exit(sys.version_info < (3, 6))' || \
	  { echo "setup: no python3 found; run: sudo apt-get install -y python3 python3-venv" >&2; exit 1; }

clean:
	rm -rf .venv .venv-bootstrap .pytest_cache .mypy_cache .ruff_cache
