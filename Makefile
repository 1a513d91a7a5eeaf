# make demo [DATA=folder] [WEIGHTS=file BACKBONE=name]   pack, train, evaluate, compare; writes runs/demo
# make test                                              lint, types, tests
# make soak                                              the remaining tests, before a release
# make backbones                                         tries each backbone of torchvision, which takes an hour
# make format                                            format and fix with ruff

PYTHON ?= python3
BIN := .venv/bin
DATA ?=
WEIGHTS ?=
BACKBONE ?=

# Where it is set, each of the processes that the tests start compiles the library again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo test soak backbones format clean

install: .venv/installed

.venv/installed: pyproject.toml hatch_build.py fastflower/loading/backends/kernel.c
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fastflower needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv || (echo "python3 -m venv failed; on Debian: apt-get install python3-venv" && false)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: .venv/installed
	$(BIN)/python tools/demo.py $(if $(DATA),--data '$(DATA)') $(if $(WEIGHTS),--weights '$(WEIGHTS)') $(if $(BACKBONE),--backbone $(BACKBONE))

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --threads 2
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

soak: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m soak

backbones: .venv/installed
	$(BIN)/python tests/helpers/try_backbone.py

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv runs/demo
