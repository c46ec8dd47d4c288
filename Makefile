# Two commands for users, `make demo` and `make test`; each sets up what it needs first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NEXT_VLLM := .cache/vllm-0.33.0

# vLLM for CPUs needs PyTorch's CPU build, which is on PyTorch's own index where no other has it.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

export HF_HUB_OFFLINE := 1
export VLLM_NO_USAGE_STATS := 1

.PHONY: demo test lint pytest setup clean bench

demo: setup
	$(BIN)/python -m demo

test: setup lint pytest

setup: $(VENV)/.installed

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	@echo "Setting up $(VENV) with vLLM for CPUs (a few minutes the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable '.[cpu,test]' || \
	    $(INSTALL) --extra-index-url $(TORCH_INDEX) --editable '.[cpu,test]'
	@# vLLM pulls these in; builds for another PyTorch break `import transformers`.
	$(BIN)/python -c 'import torchvision' 2>/dev/null || \
	    $(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(BIN)/python -m demo.vllm_command
	touch $@

# The vLLM release that has no CPU build: its Python files are enough to test the adapter.
$(NEXT_VLLM)/vllm/__init__.py: | $(VENV)/.installed
	@echo "Unpacking vLLM 0.33.0 for the adapter's tests"
	rm -rf $(NEXT_VLLM).part
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile \
	    --target $(NEXT_VLLM).part vllm==0.33.0
	mkdir -p $(dir $(NEXT_VLLM))
	rm -rf $(NEXT_VLLM) && mv $(NEXT_VLLM).part $(NEXT_VLLM)

# mypy and import-linter follow files, not the package map of setup.cfg: show them one tree.
lint: setup
	rm -rf .lint && mkdir -p .lint/vllm_hybrid_kv
	ln -s $(CURDIR)/vllm_hybrid_kv/* .lint/vllm_hybrid_kv/
	ln -s $(CURDIR)/kernels .lint/vllm_hybrid_kv/kernels
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=.lint $(BIN)/mypy -p vllm_hybrid_kv
	PYTHONPATH=.lint $(BIN)/lint-imports

pytest: setup $(NEXT_VLLM)/vllm/__init__.py
	$(BIN)/python -m pytest

bench: setup
	$(BIN)/python -m benchmarks.cpu_attention

clean:
	rm -rf $(VENV) .cache .lint build dist *.egg-info
