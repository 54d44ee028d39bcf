# Two commands do everything: `make train` and `make test`. Both set up what they need in .venv.
PYTHON ?= python3
CONFIG ?= config/gpt2_nano_sophia_kronecker.yaml
BIN := .venv/bin
PYTEST := $(BIN)/pytest -n 2 --dist worksteal
PROSE := src docs infra config README.md CONTRIBUTING.md CHANGELOG.md

.PHONY: train test test-all lint docs wheel clean

train: .venv/train.stamp
	$(BIN)/python -m sophia_levanter.main --config $(CONFIG) $(ARGS)

test: .venv/dev.stamp
	$(PYTEST) -m "not slow"

test-all: .venv/test-all.stamp
	$(PYTEST)

lint: .venv/dev.stamp
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/codespell $(PROSE)
	@! grep -rnwE -f .phrases --include='*.py' --include='*.md' --include='*.html' --exclude-dir=evidence $(PROSE) || \
	  { echo "error: reword these lines; .phrases lists what a reader stumbles over"; exit 1; }

docs: .venv/dev.stamp
	$(BIN)/mkdocs build --strict

# The wheel and the source distribution go to dist/. setuptools would take deleted files from an old build/.
wheel: | .venv/bin/python
	rm -rf build
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation -w dist .
	$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('dist')" > /dev/null

clean:
	rm -rf .venv .cache site build dist

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is $$($(PYTHON) --version); Python 3.11, 3.12 or 3.13 is needed: make PYTHON=python3.13 ..."; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt setuptools

.venv/train.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -e '.[compare]'
	touch $@

# The compiler for TPUs, which needs no TPU, and the libraries that read exported models: 6 GB.
.venv/test-all.stamp: .venv/dev.stamp
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -e '.[dev,tpu]' \
	  torch transformers
	touch $@

.venv/dev.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -e '.[dev]'
	touch .venv/train.stamp $@
