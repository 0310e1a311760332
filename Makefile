PY := .venv/bin/python
PYTEST_ARGS ?=

# Some container images set this. Each of a thousand processes would then compile vLLM, for 12 s.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup model demo test lint bench bench-serve bench-train stream peers gpu-test gpu-bench gpu-tune soak fuzz clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## /make \1\t/p' $(MAKEFILE_LIST)

setup:
	@scripts/setup.sh

demo: setup model  ## install on the first run, then memory, speed, and a question to SmolLM2
	@$(PY) examples/demo.py

model: setup  ## SmolLM2-135M-Instruct (93 MB) into build/models, once
	@$(PY) scripts/fetch_model.py || true  # it says what to do, and what needs it is left out

test: setup  ## install on the first run, then lint and all tests (PYTEST_ARGS="-m unit")
	@$(MAKE) --no-print-directory -j 2 lint model
	@$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: setup  ## ruff and mypy
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check
	@$(PY) -m mypy

bench: setup  ## CPU benchmark; writes benchmarks/results
	@$(PY) benchmarks/cpu.py

bench-serve: model  ## vllm bench serve beside full attention, as much KV memory (ARGS="--smoke")
	@$(PY) benchmarks/serve.py $(ARGS)

bench-train: setup  ## training on a CPU or GPU beside dense attention; writes benchmarks/results
	@$(PY) benchmarks/training.py

stream: setup  ## a million tokens of books; writes benchmarks/results/stream.* (TOKENS=4000000)
	@$(PY) benchmarks/stream.py --tokens $(or $(TOKENS),1000000)

peers: model  ## methods of kvpress beside SepLLM; writes benchmarks/results (SUITE=quick)
	@scripts/peers.sh
	@$(PY) benchmarks/peers.py --suite $(or $(SUITE),quick)

gpu-test:  ## tests of the kernels on a GPU, with the python that has torch and Triton for it
	@PYTHONPATH=kernels:.:build/gpu-site $(or $(PYTHON),python3) -m pytest tests/kernels -n 8 \
		--ignore tests/kernels/test_compiles.py $(ARGS)

gpu-tune:  ## which launch of a kernel is fastest on this GPU (ARGS="--operations decode")
	@PYTHONPATH=kernels:.:build/gpu-site $(or $(PYTHON),python3) benchmarks/gpu_tune.py $(ARGS)

gpu-bench:  ## kernels on a GPU, beside others (PYTHON=python3 ARGS="--contexts 32768")
	@PYTHONPATH=kernels:.:build/gpu-site $(or $(PYTHON),python3) benchmarks/gpu.py $(ARGS)

soak: setup  ## random traffic over a tight pool, checked after every step (MINUTES=10)
	@PYTHONPATH=tests/support:tools $(PY) tools/soak.py --minutes $(or $(MINUTES),10)

fuzz: setup  ## random engines under random traffic, answers against the mask (MINUTES=10)
	@PYTHONPATH=tests/support:tools $(PY) tools/fuzz.py --minutes $(or $(MINUTES),10)

clean:  ## remove caches and build output (.venv, models and trainings stay)
	rm -rf dist *.egg-info scripts/vllm-name/build scripts/vllm-name/*.egg-info
	[ ! -d build ] || find build -mindepth 1 -maxdepth 1 ! -name models ! -name training -exec rm -rf {} +
	rm -rf .pytest_cache .mypy_cache .ruff_cache
	find vllm_sepllm kernels tests benchmarks examples scripts -name __pycache__ -prune -exec rm -rf {} +
