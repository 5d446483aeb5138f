# Every target sets itself up: it needs Python 3.11+, make and openssl, nothing else.
unexport PYTHONPATH PYTHONHOME
unexport PYTHONDONTWRITEBYTECODE # each process that tests start would compile all that it imports
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOCKED := $(VENV)/locked
READY := $(VENV)/ready
GENERATED := .dev/generated
# Tests wait for processes, and for time to pass, more than they compute.
WORKERS = $(shell echo $$((2 * $$(nproc))))
PACKAGES := parallax.control_plane parallax.protos parallax.runtime parallax.sdk parallax.security
PROTOS := $(wildcard protos/*.proto)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
LOCK := $(BIN)/uv pip compile pyproject.toml --quiet --universal --generate-hashes --no-header \
	--python-version 3.11 $(if $(UPGRADE),--upgrade)

# The environment holds absolute paths, so one that was copied or moved is made anew, and so is one whose Python is gone.
ifneq ($(shell cat $(LOCKED) 2>/dev/null && $(BIN)/python -c 'import pip, structlog' 2>/dev/null && echo usable),$(CURDIR) usable)
$(shell rm -f $(LOCKED) $(READY))
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test bench soak storm crashes check generate lock wheel clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(READY) $(GENERATED)  ## make .venv with the parallax command in it

demo: setup  ## watch three agents audit real certificates while their own are replaced
	@$(BIN)/python examples/certificate_audit/demo.py

test: setup  ## run the whole test suite, two at once for each processor; ARGS="-n 0": one by one
	@$(BIN)/pytest -n $(WORKERS) --maxprocesses 16 --dist worksteal $(ARGS)

bench: setup  ## compare what a task costs here and elsewhere; ARGS="--rounds 1" and more: ARGS=--help
	@$(BIN)/python benchmarks/bench.py $(ARGS)

soak: setup  ## twice ten minutes, of crashes and of rotations: leaks, lost answers; ARGS="--minutes 2"
	@$(BIN)/python benchmarks/soak.py $(ARGS)
	@$(BIN)/python benchmarks/rotations.py $(ARGS)

storm: setup  ## rotate a server 3,000 times under a storm of handshakes; ARGS="--rotations 300"
	@$(BIN)/python benchmarks/storm.py $(ARGS)

crashes: setup  ## kill a ledger 200 times in all kinds of writes, and look for what is lost; ARGS="--rounds 20"
	@$(BIN)/python benchmarks/crashes.py $(ARGS)

check: setup  ## lint, types, layers, wire schema, generated code
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy $(PACKAGES:%=-p %)
	$(BIN)/mypy $(sort $(dir $(wildcard tests/*.py examples/*/*.py benchmarks/*.py)))
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/pytest -q tests/test_generated.py

generate: $(READY)  ## write protos/*_pb2* from protos/*.proto
	@mkdir -p .dev && ln -sfn .. .dev/parallax
	@$(BIN)/python -m grpc_tools.protoc -I parallax/protos=protos \
		--plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
		--python_out=.dev --pyi_out=.dev --grpc_python_out=.dev --mypy_grpc_out=quiet:.dev \
		$(PROTOS:%=parallax/%)

lock: $(READY)  ## write the lock files; UPGRADE=1 takes the newest versions
	$(LOCK) --group dev --extra examples --output-file requirements.lock
	$(LOCK) --constraint requirements.lock --no-annotate --output-file requirements-runtime.lock

wheel: setup  ## build dist/*.whl
	@rm -rf build dist
	$(BIN)/python -m build --quiet --wheel --no-isolation

clean:  ## remove everything that the other targets make
	rm -rf $(VENV) .dev build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(LOCKED): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "parallax needs Python 3.11 or newer, which $(PYTHON) is not; name one: make PYTHON=python3.11" >&2; exit 1; }
	@echo "making $(VENV), once: a minute or so"
	@rm -f $@
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PIP) --require-hashes -r requirements.lock
	@printf '%s\n' '$(CURDIR)' >$@

$(READY): $(LOCKED) pyproject.toml
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

# .dev/parallax leads type checkers and protoc to the packages by the names they are imported by. The generated files are
# committed: they are written anew when a .proto changes after that, never on a fresh clone, where it would hide stale ones.
$(GENERATED): $(PROTOS) | $(READY)
	@if [ -e $@ ]; then $(MAKE) --no-print-directory generate; fi
	@mkdir -p .dev && ln -sfn .. .dev/parallax && touch $@
