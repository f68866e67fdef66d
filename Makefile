# The two commands of the README, and what development needs. All of it stays in .venv.
PYTHON ?= python3
VENV := .venv
# Tests side by side: more than there are cores, since many wait. PYTEST: further arguments.
WORKERS ?= 4
PYTEST ?=
# Bytecode is written at the first import, of what is imported: pip would compile all for a minute.
PIP := $(VENV)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-times mutants smoke lint readme readme-figures article rooms docs drawings docs-figures bench-bubble bench-traffic bench-bert bench-gan bench-augment bench-async chaos clean

demo: $(VENV)/.run
	$(VENV)/bin/dtrain compare

test: $(VENV)/.test
	$(VENV)/bin/pytest -n $(WORKERS) $(PYTEST)

test-times:
	PYTEST='--times-into=$(CURDIR)/CONTRIBUTING.md' bash .ci/run

mutants: $(VENV)/.test
	$(VENV)/bin/python tests/mutants/run.py

smoke: $(VENV)/.test
	bash tests/smoke.sh

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

rooms:
	$(PYTHON) tests/rooms.py

docs: $(VENV)/.docs
	$(VENV)/bin/python scripts/docs_site.py

drawings: $(VENV)/.run
	$(VENV)/bin/python scripts/docs_drawings.py

docs-figures: $(VENV)/.run
	$(VENV)/bin/python scripts/docs_figures.py

bench-bubble bench-traffic bench-async: $(VENV)/.run
bench-bert bench-gan bench-augment: $(VENV)/.test
bench-bubble bench-traffic bench-async bench-bert bench-gan bench-augment:
	$(VENV)/bin/python benchmarks/$(@:bench-%=%).py

chaos: $(VENV)/.test
	$(VENV)/bin/python tests/distributed/chaos.py --faults 200

readme-figures: $(VENV)/.test
	$(VENV)/bin/python scripts/readme_figures.py

article: $(VENV)/.test
	$(VENV)/bin/python tests/pages.py docs/article.md

readme: $(VENV)/.test
	$(VENV)/bin/python scripts/readme_figures.py --tables

# torch first, by its pin: otherwise another package's range may choose a newer build.
$(VENV)/.run: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[accelerate,deepspeed]'
	touch $@

$(VENV)/.test: $(VENV)/.run
	$(PIP) --editable '.[test]'
	touch $@

# What builds the site, alone: it reads the sources and imports nothing of them.
$(VENV)/.docs: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) zensical
	touch $@

# Needs uv. torch is left out, with what it alone requires: its files differ from index to index.
docker/requirements.lock: pyproject.toml constraints.txt
	mkdir -p $(VENV)/lock && sed '/"torch>=/d' pyproject.toml >$(VENV)/lock/pyproject.toml
	uv pip compile --quiet --generate-hashes --no-annotate --custom-compile-command "make $@" --python-version 3.11 \
		--universal --constraint constraints.txt --extra tensorboard $(VENV)/lock/pyproject.toml --output-file $@

clean:
	rm -rf $(VENV)
