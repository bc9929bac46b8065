# make demo    train a small model here, from nothing: no root, no Slurm, no Docker, no GPU
# make test    all tests; what cannot run here is skipped with its reason
# make test-python38    the trainer and the agent on the stack of cpmlive-flash:0.0.4 (Python 3.8, torch 1.13.1), on CPUs
# make lint    ruff, mypy, vermin, and that the schemas are current
# make bench   side by side with named peers; each prints a ratio

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCH := .venv-bench
# the version that the tests are run with; any torch >= 2.4 will do
TORCH ?= torch==2.13.0
# the tests run their Python code alone, on CPUs: any interpreter will do, and no CUDA; without them, their tests skip
BMTRAIN := 0.2.3.post2 1.0.1

# cpmlive-flash:0.0.4: its packages as the Dockerfile pins them, with PyPI's torch 1.13.1, for CUDA 11.7 (2 GB)
IMAGE := .venv38
PYTHON38 ?= $(or $(lastword $(sort $(wildcard $(HOME)/.pyenv/versions/3.8.*/bin/python3.8))),python3.8)
DOCKERFILE := containers/cpmlive-flash/Dockerfile
PINNED = $(shell grep -oE "($(1))==[0-9][A-Za-z0-9.]*" $(DOCKERFILE) | sort -u)

.PHONY: demo test test-python38 lint bench clean

demo: $(READY)
	$(BIN)/cpm-submit jobs/quickstart.yaml

test: $(READY)
	$(BIN)/python -m pytest -n 2 -m 'not sandbox'
	$(BIN)/python -m pytest -m sandbox

test-python38: $(IMAGE)/.ready
	$(IMAGE)/bin/python -m pytest -n 2 tests/unit/agent tests/unit/diagnosis tests/unit/runs tests/unit/training

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/vermin -t=3.8- --no-tips --quiet cpm_cluster/agent cpm_cluster/training cpm_cluster/launch/plan.py \
	    cpm_cluster/launch/program.py cpm_cluster/launch/runtimes cpm_cluster/diagnosis cpm_cluster/specs/problems.py \
	    cpm_cluster/runs/layout.py cpm_cluster/runs/records.py cpm_cluster/runs/run.py cpm_cluster/runs/state.py \
	    cpm_cluster/runs/telemetry.py cpm_cluster/runs/heartbeats.py

bench: $(BENCH)/.ready
	$(BENCH)/bin/python benchmarks/cold_start.py
	$(BENCH)/bin/python benchmarks/launch_overhead.py
	$(BENCH)/bin/python benchmarks/planner_speed.py
	$(BENCH)/bin/python benchmarks/planner_accuracy.py --hold-out
	$(BENCH)/bin/python benchmarks/data_loading.py
	$(BENCH)/bin/python benchmarks/train_overhead.py

clean:
	rm -rf $(VENV) $(BENCH) $(IMAGE) .bmtrain build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(READY): setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "cpm-cluster needs Python 3.10 or newer; make PYTHON=python3.11 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[train,dashboard,test]'
	$(BIN)/python -m compileall -q cpm_cluster
	-for version in $(BMTRAIN); do $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
	    --only-binary :all: --python-version 3.11 --platform manylinux2014_x86_64 \
	    --target .bmtrain/$$version bmtrain==$$version || exit; done
	touch $@

$(IMAGE)/.ready: $(DOCKERFILE)
	@$(PYTHON38) -c "import sys; sys.exit(sys.version_info[:2] != (3, 8))" || { \
	    echo "no Python 3.8 ($(PYTHON38)); name one: make PYTHON38=/path/to/python3.8 test-python38" >&2; exit 1; }
	$(PYTHON38) -m venv $(IMAGE)
	$(IMAGE)/bin/python -m pip install --quiet --disable-pip-version-check --only-binary :all: \
	    $(call PINNED,torch|numpy|einops|pytrie|tensorboardX|protobuf|safetensors|tokenizers) \
	    tensorboard==2.14.0 pytest==8.3.5 pytest-timeout==2.4.0 pytest-xdist==3.6.1 hypothesis==6.113.0
	$(IMAGE)/bin/python -m pip install --quiet --disable-pip-version-check --only-binary :all: --no-deps \
	    $(call PINNED,bmtrain|nvidia-nccl-cu11)
	touch $@

# peers in an environment of their own, beside an ordinary (not editable) installation
$(BENCH)/.ready: setup.cfg pyproject.toml $(shell find cpm_cluster configs jobs -type f -not -name '*.pyc')
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	DS_BUILD_OPS=0 $(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check '.[train]' torchx==0.7.0 \
	    accelerate==1.15.0 deepspeed==0.19.8 transformers==5.24.0
	touch $@
