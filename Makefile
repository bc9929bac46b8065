# make demo    train a small model here, from nothing: no root, no Slurm, no Docker, no GPU
# make test    all tests; what cannot run here is skipped with its reason
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

.PHONY: demo test lint bench clean

demo: $(READY)
	$(BIN)/cpm-submit jobs/quickstart.yaml

test: $(READY)
	$(BIN)/python -m pytest -n 2 -m 'not sandbox'
	$(BIN)/python -m pytest -m sandbox

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
	rm -rf $(VENV) $(BENCH) .bmtrain build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

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

# peers in an environment of their own, beside an ordinary (not editable) installation
$(BENCH)/.ready: setup.cfg pyproject.toml $(shell find cpm_cluster configs jobs -type f -not -name '*.pyc')
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	DS_BUILD_OPS=0 $(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check '.[train]' torchx==0.7.0 \
	    accelerate==1.15.0 deepspeed==0.19.8 transformers==5.24.0
	touch $@
