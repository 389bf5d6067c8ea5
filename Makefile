# Two commands set everything up on a fresh Debian or Ubuntu machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv/bin
STAMP := .venv/.pins

# Two workers; with more, servers would share cores. What asserts times runs after that, beside nothing.
PARALLEL := $(VENV)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

.PHONY: demo test test-unit test-long check audit site docs docs-reference docs-pictures wheels ui stop

LOCKS := $(filter-out requirements/torch.txt,$(wildcard requirements/*.txt containers/runtimes/*.txt))

demo: $(STAMP)  ## Release the demo model in both of its schemes, end to end.
	$(VENV)/slipway doctor --fix
	$(VENV)/slipway release demo

test: $(STAMP)  ## Unit tests, stage tests against the real parts, and one whole release.
	$(VENV)/slipway doctor --fix
	$(PARALLEL) -m 'not long and not timed'
	$(VENV)/python -m pytest -m 'timed and not long'

test-unit: $(STAMP)  ## The unit tests alone, in two minutes.
	$(PARALLEL) tests/unit

test-long: $(STAMP)  ## What takes too long for every change: large transfers, a second runtime, a real model.
	$(VENV)/slipway doctor --fix
	$(PARALLEL) -m 'long and not timed'
	$(VENV)/python -m pytest -m 'long and timed'
	SLIPWAY_FUZZ_EXAMPLES=5000 $(VENV)/python -m pytest -n 2 tests/unit/test_fuzz.py
	$(VENV)/python tests/mutation.py

check: $(STAMP) site  ## Lint, format and types; the documentation's site.
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/mypy

site: $(STAMP) .venv/docs/.pins  ## The documentation's site, in build/site; a warning is an error.
	NO_MKDOCS_2_WARNING=1 .venv/docs/bin/mkdocs build

docs: site  ## The same, served on loopback; it follows changes.
	NO_MKDOCS_2_WARNING=1 .venv/docs/bin/mkdocs serve

docs-reference: $(STAMP)  ## Write anew what the documentation takes from the code.
	$(VENV)/python docs/generator

docs-pictures: $(STAMP)  ## Make the documentation's pictures of Dagster and MLflow anew, with the browser test.
	SLIPWAY_PICTURES=docs/pictures $(VENV)/python -m pytest tests/end_to_end/test_ui.py -k a_person_launches

.venv/docs/.pins: requirements/docs.txt | $(STAMP)
	$(VENV)/uv venv --quiet --allow-existing .venv/docs
	$(VENV)/uv pip install --quiet --python .venv/docs/bin/python --require-hashes -r requirements/docs.txt
	touch $@

wheels: $(STAMP)  ## The wheels of slipway and slipway-registry, in build/wheels.
	$(VENV)/uv build --quiet --wheel . -o build/wheels --require-hashes --build-constraints requirements/hatchling.txt
	$(VENV)/uv build --quiet --wheel registry -o build/wheels --require-hashes --build-constraints requirements/hatchling.txt

audit: $(STAMP)  ## Every pinned version against PyPI's list of known vulnerabilities; needs PyPI itself (SECURITY.md).
	$(VENV)/uv venv --quiet --allow-existing .venv/audit
	$(VENV)/uv pip install --quiet --python .venv/audit/bin/python --require-hashes -r requirements/audit.txt
	.venv/audit/bin/pip-audit --strict --disable-pip --require-hashes $(LOCKS:%=-r %)

ui: $(STAMP)  ## Dagster and MLflow on loopback.
	$(VENV)/slipway ui

stop:  ## End the private container engine, if one was started.
	$(VENV)/slipway stop

$(STAMP): requirements/development.txt requirements/hatchling.txt requirements/uv.txt pyproject.toml registry/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "slipway needs Python 3.11 or later: PYTHON=python3.11 make"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -y -qq python3-venv; } || { echo "install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv
	$(VENV)/pip install --quiet --require-hashes -r requirements/uv.txt
	$(VENV)/uv pip install --compile-bytecode --python $(VENV)/python --require-hashes -r requirements/development.txt
	$(VENV)/uv pip install --quiet --python $(VENV)/python --no-deps --require-build-hashes --build-constraints requirements/hatchling.txt -e . -e registry
	touch $(STAMP)
