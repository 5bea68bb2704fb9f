# make demo    set up, build a corpus, pretrain a small model on it, plot and sample
# make test    set up, run the tests
# make check   format, lint, types
# make help    everything else

PYTHON ?= python3
VENV   ?= .venv
FAMILY ?= daria_former
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
RUN    := runs/demo_$(FAMILY)

# Importing torch and DeepSpeed takes seconds of one core; ranks of a test share two.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 WANDB_MODE=offline

.PHONY: help setup demo test reordered soak check format bench gpu-check clean

help:
	@echo "make setup      a virtual environment in $(VENV) with the pinned packages"
	@echo "make demo       set-up, corpus, training through the deepspeed launcher, curve, sample"
	@echo "make test       set-up, all tests that need no GPU"
	@echo "make reordered  tests of models and layouts, with sums in another order"
	@echo "make soak       the slow tests: kills, failing nodes, hostile files, every launcher"
	@echo "make check      format, lint, types"
	@echo "make bench      every benchmark, as ratios (tests/benchmarks)"
	@echo "make gpu-check  correctness and speed on one CUDA device (tests/gpu)"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt --editable '.[dev,mpi]'
	touch $@

demo: $(STAMP)
	$(BIN)/python -m data_tools.demo_corpus --output data/demo
	PATH="$(abspath $(BIN)):$$PATH" deepspeed pretrain/train.py --config-name demo model=$(FAMILY)/demo \
		run_dir=$(RUN)
	$(BIN)/python -m pretrain.plot $(RUN) --output $(RUN)/loss.png
	$(BIN)/python -m models.generate --checkpoint $(RUN) --prompt "def read(self" --max-new-tokens 120
	@echo "Next: deepspeed --num_gpus 2 pretrain/train.py --config-name demo model=$(FAMILY)/demo parallel.tensor=2 run_dir=$(RUN)_tp2"

test: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest tests --ignore tests/gpu --ignore tests/benchmarks -m "not slow" \
		-n 2 --dist loadgroup

reordered: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest --reorder-sums tests/models tests/parallel \
		tests/pretrain/test_layouts.py tests/pretrain/test_engine.py -m "not slow" -n 2 --dist loadgroup

soak: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest tests --ignore tests/gpu --ignore tests/benchmarks -m slow

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	$(BIN)/python -m tests.benchmarks

gpu-check:
	$(PYTHON) -m pytest tests/gpu
	$(PYTHON) -m tests.gpu.benchmark

clean:
	rm -rf runs data .mypy_cache .ruff_cache .pytest_cache
