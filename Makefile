# Every target sets itself up. PY=python uses an environment of yours instead of .venv.
PYTHON ?= python3
TORCH ?= torch==2.13.0
PIP_FLAGS ?=
SUITE ?= default

ifeq ($(origin PY),undefined)
PY := .venv/bin/python
READY := .venv/.ready
endif
BENCH := $(PY) -m meft_bench
INPUTS := $(if $(MODEL),--model "$(MODEL)") $(if $(DATA),--data "$(DATA)") $(if $(DEVICE),--device $(DEVICE)) $(if $(WORKERS),--workers $(WORKERS))
# make replicate SUITE=full CLUSTER=slurm PARTITION=gpu GPUS_PER_RUN=1 ACCOUNT=mine MINUTES=240 MEMORY=64GB (docs/cluster.md)
JOBS := $(if $(CLUSTER),--cluster $(CLUSTER) $(if $(PARTITION),--partition "$(PARTITION)") $(if $(ACCOUNT),--account "$(ACCOUNT)") \
	$(if $(QOS),--qos "$(QOS)") $(if $(CONSTRAINT),--constraint "$(CONSTRAINT)") $(if $(GPUS_PER_RUN),--gpus-per-run $(GPUS_PER_RUN)) \
	$(if $(CPUS_PER_RUN),--cpus-per-run $(CPUS_PER_RUN)) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(MEMORY),--memory $(MEMORY)) \
	$(if $(GPU_MEMORY),--gpu-memory $(GPU_MEMORY)))

STATUS := $(if $(filter file,$(origin SUITE)),,--suite $(SUITE)) $(if $(MODEL),--model "$(MODEL)") $(if $(DATA),--data "$(DATA)") \
	$(if $(DEVICE),--device $(DEVICE))

# make profile GPU=24GB MODEL=llama-7b BATCH=2 SEQ=256 ACCUM=1,4 UNION=0.3 HOST=server NEURONS=3072 LINK=pcie3 FULL=1
# make profile GPU=a100 GPUS=8 MODEL=llama-70b NETWORK=100gbe
GPU ?= 24GB
PROFILE := $(if $(MODEL),--model "$(MODEL)") $(if $(BATCH),--batch $(BATCH)) $(if $(SEQ),--seq $(SEQ)) $(if $(ACCUM),--accumulation $(ACCUM)) \
	$(if $(UNION),--union $(UNION)) $(if $(HOST),--host $(HOST)) $(if $(WORKERS),--workers $(WORKERS)) \
	$(if $(NEURONS),--neurons $(NEURONS)) $(if $(FULL),--full) $(if $(LINK),--link $(LINK)) $(if $(GPUS),--gpus $(GPUS)) \
	$(if $(NETWORK),--network $(NETWORK))

.PHONY: help setup gpu replicate status profile selection report publish sweep base bench test lint doctor

help:
	@echo "make replicate              train, evaluate and render the paper's comparison (about 12 minutes on 2 cores)"
	@echo "make replicate SUITE=smoke  the same path on a tiny grid (a minute or two)"
	@echo "make replicate SUITE=full   three seeds and more for every verdict (about 90 minutes on 2 cores; resumable)"
	@echo "make replicate SUITE=real MODEL=DIR DATA=DIR    real rows on a small real model"
	@echo "make replicate SUITE=smollm2 DATA=DIR           SmolLM2-135M: invented people and real rows, what was forgotten (hours on a CPU)"
	@echo "make replicate SUITE=frontier                   what was learnt against what was forgotten, every method at several rates (42 minutes on 2 cores)"
	@echo "make replicate SUITE=neighbours                 the systems that the paper is listed with, a test for each (an hour; one alone: ONLY=flexgen)"
	@echo "make replicate SUITE=paper MODEL=llama-7b       what the paper's own Table 1 needs; runs what fits"
	@echo "make replicate CLUSTER=slurm PARTITION=gpu GPUS_PER_RUN=1   any suite as jobs of Slurm (CLUSTER=local: as local jobs; docs/cluster.md)"
	@echo "make status                 which runs are done, at work, waiting or failed, and where"
	@echo "make profile GPU=24GB       what fits in that memory, how fast, and the best of it (a minute; every size and the largest: FULL=1)"
	@echo "make selection DATA=DIR     how many neurons a trained SmolLM2-135M needs, for the profile (about 15 minutes on one thread)"
	@echo "make profile GPU=a100 GPUS=8 MODEL=llama-70b    the plan at scale: 1 to 8 GPUs, 1 to 16 nodes, and what one would pick instead (simulated)"
	@echo "make gpu                    on a machine with a GPU: CUDA tests, then measured rows beside what was predicted (8 minutes, no network)"
	@echo "make test | lint            everything that must hold | style and types"
	@echo "make report | publish       render again from records | keep this machine's records of clean commits"
	@echo "make sweep | base | bench   learning rates | the embedded model (or MODEL=smollm2-135m) | speed of changes, kernels, layer, retrieval, step; bytes (about 10 minutes)"
	@echo "make doctor                 what this machine has"

setup: $(READY)

# Under a lock, which the system releases after any kill: two commands in a fresh clone set up once.
.venv/.ready: pyproject.toml meft_bench/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "meft-bench needs Python 3.11 or newer: make setup PYTHON=python3.11")'
	@mkdir -p .venv
	@exec 9>.venv/.lock && $(PYTHON) -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)' && $(MAKE) --no-print-directory .venv/.installed
	@touch .venv/.ready

# torch as TORCH names it; every other package as pinned, by digest; then the package itself, and what this platform needs besides.
.venv/.installed: pyproject.toml meft_bench/constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet $(PIP_FLAGS) "$(TORCH)"
	.venv/bin/python -m pip install --quiet $(PIP_FLAGS) --no-deps --require-hashes --requirement meft_bench/constraints.txt
	.venv/bin/python -m pip install --quiet $(PIP_FLAGS) --editable ".[dev]"
	@.venv/bin/python -m meft_bench.meft.engine.native
	@touch .venv/.installed

replicate: $(READY)
	@$(BENCH) replicate --suite $(SUITE) $(INPUTS) $(if $(ONLY),--only $(ONLY)) $(JOBS)

status: $(READY)
	@$(BENCH) status $(STATUS)

profile: $(READY)
	@$(BENCH) profile --gpu $(GPU) $(PROFILE)

# make selection DATA=DIR NEURONS=384,1536,3072,6144 STEPS=40
SELECTION := $(if $(MODEL),--model "$(MODEL)") $(if $(DATA),--data "$(DATA)") $(if $(TASK),--task $(TASK)) \
	$(if $(NEURONS),--neurons $(NEURONS)) $(if $(STEPS),--steps $(STEPS))

selection: $(READY)
	@$(BENCH) selection $(SELECTION)

# Without a setup where python3 has a torch that sees a GPU: such a machine may have no network. Needs no git.
# make gpu SECONDS=900 OUTPUT=out COMMIT=...
ifneq ($(filter gpu,$(MAKECMDGOALS)),)
GPU_PY := $(if $(READY),$(shell python3 -c 'import sys; sys.version_info >= (3, 11) or sys.exit(); import torch, transformers; \
	print("python3" if torch.cuda.is_available() else "")' 2>/dev/null),$(PY))
endif
GPU_FLAGS := $(if $(SECONDS),--seconds $(SECONDS)) $(if $(OUTPUT),--output "$(OUTPUT)") $(if $(COMMIT),--commit $(COMMIT)) \
	$(if $(HOST_MEMORY),--host-memory $(HOST_MEMORY)) $(if $(TINY),--tiny)

gpu: $(if $(GPU_PY),,$(READY))
	@HF_HUB_OFFLINE=1 $(or $(GPU_PY),$(PY)) -m meft_bench gpu $(GPU_FLAGS)

sweep: $(READY)
	@$(BENCH) replicate --suite sweep $(INPUTS) $(JOBS)

report: $(READY)
	@$(BENCH) report

publish: $(READY)
	@$(BENCH) publish

base: $(READY)
	@OMP_NUM_THREADS=1 $(BENCH) base $(if $(MODEL),--model "$(MODEL)")

bench: $(READY)
	@$(BENCH) bench

doctor: $(READY)
	@$(BENCH) doctor

test: $(READY)
	$(PY) -m pytest -n 2 --dist loadfile
	$(PY) -m pytest -n 2 --dist loadfile tests/profile tests/simulate

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
