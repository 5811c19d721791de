# make demo | make test | make bench | make gpu | make faults: each sets up .venv by itself (python >= 3.11)
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: help demo test bench gpu faults lock clean

help:
	@sed -n 's/^\([a-z]*\):.*## /make \1	/p' Makefile

.venv/installed: requirements.lock
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'python 3.11 or newer is needed: make PYTHON=python3.11')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	touch $@

demo: .venv/installed  ## RESCUE's whole pipeline on a real 135M model, on a laptop's CPU
	PATH="$(CURDIR)/$(BIN):$$PATH" TRAIN=$(TRAIN) TEST=$(TEST) bash demo/demo.sh

test: .venv/installed  ## ruff, then every test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

bench: .venv/installed  ## step time and memory beside the padded step and peers; ARGS=--help
	$(BIN)/python benchmarks/bench.py $(ARGS)

gpu: .venv/installed  ## one GPU, eight minutes: is the CUDA path right, how fast; without CUDA its small form
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python benchmarks/gpu.py $(ARGS)

faults: .venv/installed  ## the long fault rig: kills, signals, torn files, malformed inputs
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m tests.faults $(ARGS)

lock:  ## requirements.lock from what .venv holds now
	sed -n '/^#/p' requirements.lock > .lock && $(BIN)/python -m pip freeze | sed 's/+cpu//' >> .lock && mv .lock requirements.lock

clean:  ## what make demo wrote (not the model)
	rm -rf data/demo runs/demo-* runs/eval/demo-*
