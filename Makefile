# Every target sets up what it needs. Only vioasid's own output goes to stdout: `make boot ARGS=--json` is clean JSON.
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help boot doctor test check bench fuzz mutants clean

ARGS ?=
TIME ?= 60
PYTHON := .venv/bin/python
# not what cffi writes, and not what includes libvfio-user's header, which may not be fetched yet
C_FILES := $(filter-out backend/core/_native.c bench/mmio_floor.c, \
	$(wildcard $(addsuffix /*.c,backend/core backend/core/formats guest-tests/programs guest-tests/sva bench tests tests/fuzz)))
C_FLAGS := -std=gnu11 -O2 -Wall -Wextra -Werror -Ibackend/core -Iguest-tests/programs -Iguest-tests/modules

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "ARGS='...' hands arguments on, as in: make boot ARGS='--full --json'"
	@echo "make itself exits with 2 whenever a target fails. For the exit code of vioasid (1 a check failed,"
	@echo "2 could not run, 3 the VM was lost) run .venv/bin/vioasid after any of these targets."

boot: ## boot a Debian guest behind the IOMMU and check every DMA
	@tools/environment.sh
	@.venv/bin/vioasid boot $(ARGS)

doctor: ## say what this machine has and lacks, and the fix
	@tools/environment.sh
	@.venv/bin/vioasid doctor $(ARGS)

test: ## run all tests, guests included
	@tools/environment.sh
	@$(PYTHON) -m pytest $(ARGS)

check: ## ruff, mypy --strict, C warnings as errors
	@tools/environment.sh
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m mypy
	@for file in $(C_FILES); do $(CC) $(C_FLAGS) -c -o /dev/null $$file || exit 1; done

bench: ## measure against the floor, in one run
	@tools/environment.sh
	@$(PYTHON) -m bench $(ARGS)

fuzz: ## libFuzzer on the C core for TIME=60 seconds, with sanitizers
	@tools/environment.sh
	@tools/host-setup.sh fuzz >/dev/null
	@$(PYTHON) tests/fuzz/fuzzing.py --time $(TIME) $(ARGS)

mutants: ## show which of the guest's checks notice small errors put into the sources, one at a time
	@tools/environment.sh
	@$(PYTHON) tests/mutants/mutants.py $(ARGS)

clean: ## remove all that was made here (the cache of fetched files stays)
	@rm -rf .venv build dist *.egg-info guest-tests/build backend/core/_native.c backend/core/*.so backend/core/*.o
	@rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -prune -exec rm -rf {} +
