# make demo    set up, build a corpus, pretrain a small model on it, plot and sample
# make test    set up, run the tests
# make check   format, lint, types
# make help    everything else

PYTHON ?= python3
VENV   ?= .venv
FAMILY ?= daria_former
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
COMPILED := $(VENV)/.compiled
RUN    := runs/demo_$(FAMILY)
# A step of llama takes half the time of one of the others.
STEPS  := $(if $(filter llama,$(FAMILY)),400,300)
# This one reads the bytes of the corpus, four to a patch, and no tokens.
DATA   := $(if $(filter agiformer,$(FAMILY)),data=bytes data.sequence_length=512)
SAMPLING := --max-new-tokens 120 --temperature 0.7 --top-p 0.8
export PROMPT := def read(self

# Importing torch and DeepSpeed takes seconds of one core; ranks of a test share two. Byte code is
# written: without it, every worker and every command that a test starts compiles the project anew.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 WANDB_MODE=offline PYTHONDONTWRITEBYTECODE=

# Some tests only wait, for Slurm or for a timeout, so there is one worker more than there are cores;
# each needs 1 to 2 GB. All tests of a file share a worker, and files are begun in the order of
# tests/conftest.py. `make test TEST_WORKERS=0` uses no workers.
TEST_WORKERS ?= $(shell cores=$$(nproc 2>/dev/null || sysctl -n hw.ncpu); echo $$((cores < 8 ? cores + 1 : 8)))
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: help setup demo test ecosystem reordered soak check format bench gpu-check clean

help:
	@echo "make setup      a virtual environment in $(VENV) with the pinned packages"
	@echo "make demo       set-up, corpus, training through the deepspeed launcher, curve, sample"
	@echo "make test       set-up, all tests that need no GPU, at the layouts that combine most"
	@echo "make ecosystem  what is exchanged with other projects, with their packages in $(ECOSYSTEM)"
	@echo "make reordered  tests of models and layouts, with sums in another order"
	@echo "make soak       the slow tests: every layout and launcher, kills, failing nodes, hostile files"
	@echo "make check      format, lint, types"
	@echo "make bench      every benchmark, as ratios (tests/benchmarks)"
	@echo "make gpu-check  correctness and speed on one CUDA device (tests/gpu)"

setup: $(STAMP)

# One call of pip resolves once. The builds use the packages of the environment instead of fetching
# their own, and byte code is left to the first import, which needs few of the files. What pip says
# is in its log, and the end of it on the terminal if it fails.
PIP := $(BIN)/python -m pip install --no-compile --disable-pip-version-check --no-input -c constraints.txt
LOGGED := >> $(VENV)/pip.log 2>&1 || { tail -n 20 $(VENV)/pip.log >&2; exit 1; }

$(STAMP): pyproject.toml constraints.txt
	@echo "set-up 1/3: a virtual environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/pip.log $(COMPILED)
	@echo "set-up 2/3: pip and what builds packages"
	@$(PIP) pip setuptools wheel packaging $(LOGGED)
	@echo "set-up 3/3: torch, DeepSpeed and all else at pinned versions (minutes; log: $(VENV)/pip.log)"
	@DS_BUILD_OPS=0 $(PIP) --no-build-isolation --editable '.[dev,mpi]' $(LOGGED)
	@touch $@

# Tests take a warning for an error, and a compiler warns where it meets a file first. What packages
# bring to test themselves, a seventh of their text, nobody imports.
$(COMPILED): $(STAMP)
	@echo "set-up: byte code of all packages"
	@$(BIN)/python -W ignore -m compileall -qq -j 0 -x /tests/ $(VENV)/lib || true
	@touch $@

demo: $(STAMP)
	@echo "demo 1/4: a corpus of Python's own source, in data/demo"
	@$(BIN)/python -m data_tools.demo_corpus --output data/demo
	@echo "demo 2/4: training; the deepspeed launcher starts and imports torch"
	@PATH="$(abspath $(BIN)):$$PATH" deepspeed --quiet pretrain/train.py --config-name demo_muon \
		model=$(FAMILY)/demo_wide $(DATA) training.max_steps=$(STEPS) run_dir=$(RUN)
	@echo "demo 3/4: the loss curve, in $(RUN)/loss.png"
	@$(BIN)/python -m pretrain.plot $(RUN) --output $(RUN)/loss.png
	@echo "demo 4/4: a sample"
	@$(BIN)/python -m models.generate --checkpoint $(RUN) --prompt "$$PROMPT" $(SAMPLING)
	@echo "Next: deepspeed --num_gpus 2 pretrain/train.py --config-name demo model=$(FAMILY)/demo $(DATA) parallel.tensor=2 run_dir=$(RUN)_tp2"

# `make test SUMS=reordered`: all tests, those of `make reordered` in that order alone.
test: $(COMPILED)
	$(PYTEST) $(if $(filter reordered,$(SUMS)),--reorder-sums) tests --ignore tests/gpu --ignore tests/benchmarks -m "not slow and not ecosystem"

# The packages of other projects, in an environment of their own that also sees $(VENV): some of them
# pin an older NumPy than ours, so that pip is given an exact list and resolves nothing.
ECOSYSTEM := .venv-ecosystem
LIST := tests/ecosystem.txt
# Only read: without CUDA it cannot be imported, and would be in the way of those who try.
UNLOADABLE := transformer-engine==2.20.2
ecosystem: $(COMPILED) $(ECOSYSTEM)/.installed
	$(TEST_ENV) $(ECOSYSTEM)/bin/python -m pytest tests -m ecosystem

$(ECOSYSTEM)/.installed: $(STAMP) $(LIST)
	@$(BIN)/python -m venv $(ECOSYSTEM)
	@$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> "$$($(ECOSYSTEM)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/ours.pth"
	@$(ECOSYSTEM)/bin/python -m pip install -q --disable-pip-version-check --no-deps -r $(LIST)
	@$(ECOSYSTEM)/bin/python -m pip install -q --disable-pip-version-check --no-deps \
		--target $(ECOSYSTEM)/sources $(UNLOADABLE)
	@touch $@

# Tests of text, commands and threads, which compare no floating-point numbers of this process.
WITHOUT_SUMS := models/hf/test_tokenizer.py models/test_convert_tokens.py models/test_contributing.py \
	models/daria_former/standalone/test_cli.py models/test_registry.py models/test_prompting.py parallel/cpu

reordered: $(COMPILED)
	$(PYTEST) --reorder-sums tests/models tests/parallel tests/pretrain/layouts/test_daria_former_run.py \
		tests/pretrain/engine/test_engine.py tests/pretrain/layouts/test_layouts.py -m "not slow and not ecosystem" \
		$(addprefix --ignore tests/,$(WITHOUT_SUMS))

soak: $(COMPILED)
	$(TEST_ENV) $(BIN)/python -m pytest tests --ignore tests/gpu --ignore tests/benchmarks -m "slow and not ecosystem"

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	$(BIN)/python -m tests.benchmarks

# In parts, each of which has 8 minutes. A part that has passed is not run again until a source
# changes, so that what an interruption or a time limit leaves is done by the same command.
GPU_PARTS = $(patsubst tests/gpu/test_%_gpu.py,%,$(sort $(wildcard tests/gpu/test_*_gpu.py))) benchmark
GPU_SOURCES = $(shell find data_tools models parallel pretrain configs tests -name '*.py' -o -name '*.yaml' -o \
	-name '*.json' | sort | xargs cat | sha256sum | cut -c 1-12)
GPU_LIMIT ?= 480
GPU_DONE ?= .gpu-check

gpu-check:
	@sources=$(GPU_SOURCES); failed=; for part in $(GPU_PARTS); do \
		done=$(GPU_DONE)/$$sources/$$part; \
		if [ -e $$done ]; then echo "gpu-check $$part: passed before"; continue; fi; \
		if [ $$part = benchmark ]; then run="tests.gpu.benchmark"; \
		else run="pytest -q tests/gpu/test_$${part}_gpu.py"; fi; \
		echo "gpu-check $$part"; mkdir -p $(GPU_DONE)/$$sources; \
		if timeout $(GPU_LIMIT) $(PYTHON) -m $$run; then touch $$done; \
		else failed="$$failed $$part"; fi; \
	done; [ -z "$$failed" ] || { echo "failed:$$failed; make gpu-check tries these again"; exit 1; }

clean:
	rm -rf runs data $(ECOSYSTEM) .gpu-check .mypy_cache .ruff_cache .pytest_cache
