# Every target makes the virtual environment it needs; `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A file's tests share fixtures. Files start in the order of their names; by default those with one test, often a long one, would come last.
PARALLEL := -n auto --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help demo test check lint types format audit docs pages bench clean

help: ## List the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

demo: $(VENV)/.installed-cpu ## Handwritten digits: distil, export, explain, report
	$(BIN)/kdx demo --out demo

test: $(VENV)/.installed-dev ## The test suite (long tests: make test ARGS='-m slow')
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

check: lint types ## Style, types and the fast tests, in less than two minutes
	$(BIN)/python -m pytest $(PARALLEL) -m 'not slow and not medium' $(ARGS)

lint: $(VENV)/.installed-dev ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev ## Check types
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## Format the code
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

audit: $(BIN)/python ## Look up known vulnerabilities of the pinned dependencies; skipped without a network
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --retries 0 --timeout 10 pip-audit 2>/dev/null \
	|| { echo 'audit: skipped, because pip-audit cannot be installed without a network'; exit 0; }; \
	$(BIN)/python -m pip_audit --strict --requirement constraints.txt --no-deps --disable-pip --progress-spinner off

docs: $(VENV)/.installed-docs ## Build the documentation into site/; a warning or a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --clean --quiet
	$(BIN)/python -m docs.check_site site
	@echo 'The documentation: site/index.html'

pages: $(VENV)/.installed-dev ## Draw and fill in what the documentation takes from the source: pictures, error messages, notebooks
	$(BIN)/python -m docs.draw_architecture
	$(BIN)/python -m docs.draw_composites
	$(BIN)/python -m docs.draw_concepts
	$(BIN)/python -m docs.draw_coverage
	$(BIN)/python -m docs.draw_planted
	$(BIN)/python -m docs.error_messages
	$(BIN)/python -m docs.notebooks

bench: $(VENV)/.installed-dev ## Time everything against what bounds it, and fill in the README's tables
	$(BIN)/python -m benchmarks.run $(ARGS)
	$(BIN)/python -m benchmarks.readme

clean: ## Delete the virtual environment and what the tools left
	rm -rf $(VENV) demo site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kdx needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-cpu: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu]'
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,openvino,models,dev]'
	touch $@ $(VENV)/.installed-cpu

$(VENV)/.installed-docs: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@
