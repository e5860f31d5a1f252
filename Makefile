# The two lines for a fresh clone:
#   make demo     trains an encoder on handwritten digits and shows what came out
#   make test     runs the tests
# Both make an environment in .venv first, and do again only what has changed.

VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch>=2.13
PEERS_VENV ?= .venv-peers
ARGS ?=
WORKERS ?= 2

ENV_PYTHON := $(VENV)/bin/python
# No build isolation: the C++ autograd is for the very torch that it runs with. PATH: torch looks for ninja there.
PIP := PATH="$(abspath $(VENV)/bin):$$PATH" $(ENV_PYTHON) -m pip --disable-pip-version-check --quiet
BUILD := build/$(notdir $(VENV))
TORCH_STAMP := $(VENV)/stamp-$(subst /,_,$(subst $() ,_,$(TORCH)))
# Whatever is installed later leaves torch as it is.
CONSTRAINT := $(VENV)/torch.txt
CXX_FILES := $(sort $(foreach end,h cpp cuh cu,$(wildcard csrc/*.$(end) csrc/*/*.$(end))))
# All tests: in several processes, each file in one of them, with one thread where a test does not ask for more.
# Some tests, by ARGS: in one process, where -s and --pdb work.
PARALLEL := OMP_NUM_THREADS=1 $(ENV_PYTHON) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
PYTEST := $(if $(ARGS),$(ENV_PYTHON) -m pytest $(ARGS),$(PARALLEL))
FORMATTED := $(CXX_FILES) $(wildcard tests/native/*.cpp tests/native/*.h)

.PHONY: help demo examples test test-full test-smoke bench bench-peers gpu gpu-there resources lint format clean
.DELETE_ON_ERROR:

help:
	@echo "make demo         train an encoder on handwritten digits; pictures and figures go to out/digits"
	@echo "make examples     every kind of data and application beside its baseline, one table; some minutes"
	@echo "make test         run the tests; some of them: make test ARGS='tests/test_modules.py -k bias'"
	@echo "make test-full    the same and the longest sweeps under sanitizers"
	@echo "make test-smoke   run the few tests that tell whether an installation works"
	@echo "make bench        compare with eager PyTorch and others: hours; less exact in one: ARGS='--processes 1'; a look: ARGS=--quick"
	@echo "make bench-peers  install JAX, Keras and scikit-learn into $(PEERS_VENV), for make bench to compare with"
	@echo "make gpu          on a machine with a GPU: tests, benchmark, compute-sanitizer; the report goes to out/gpu"
	@echo "make resources    compile the GPU kernels for every GPU and write down what they need: tests/gpu/*resources.json"
	@echo "make lint         ruff, clang-format, mypy"
	@echo "make format       let ruff and clang-format change the files"
	@echo "make clean        remove what was built; an environment is removed by rm -r $(VENV)"
	@echo
	@echo "WORKERS=2                              processes that share all the tests; those by ARGS run in one"
	@echo "VENV=.venv-cpu TORCH='torch==2.13.0'   another environment, with another torch"
	@echo "PYTHON=python3.12                      the Python that makes the environment"
	@echo "FASTENC_CUDA=0, TORCH_CUDA_ARCH_LIST=8.0   compile no CUDA kernels, or for one GPU: minutes less; see setup.py"

demo: $(BUILD)/built
	$(ENV_PYTHON) examples/digits.py $(ARGS)

examples: $(BUILD)/built $(VENV)/stamp-test $(VENV)/stamp-tools
	$(ENV_PYTHON) examples/everything.py $(ARGS)

test: $(BUILD)/built $(VENV)/stamp-test $(VENV)/stamp-tools
	$(PYTEST)

test-full: $(BUILD)/built $(VENV)/stamp-test $(VENV)/stamp-tools
	$(PYTEST) -m "not brief"

test-smoke: $(BUILD)/built $(VENV)/stamp-test
	$(ENV_PYTHON) -m pytest tests/test_smoke.py $(ARGS)

bench: $(BUILD)/built $(VENV)/stamp-tools
	$(ENV_PYTHON) -m benchmarks $(ARGS)

bench-peers: $(PEERS_VENV)/stamp-peers

$(PEERS_VENV)/stamp-peers: benchmarks/peers/requirements.txt | $(ENV_PYTHON)
	@echo "fastenc: installing JAX, Keras on TensorFlow and on torch, and scikit-learn into $(PEERS_VENV): some GB of disk"
	@"$(PYTHON)" -m venv "$(PEERS_VENV)"
	@$(PEERS_VENV)/bin/python -m pip --disable-pip-version-check --quiet install "$(TORCH)" -r benchmarks/peers/requirements.txt
	@touch "$@"

gpu: gpu-there $(BUILD)/built $(VENV)/stamp-test
	$(ENV_PYTHON) tests/gpu/on_gpu.py $(ARGS)

gpu-there:
	@nvidia-smi -L >/dev/null 2>&1 || { echo "fastenc: nvidia-smi finds no GPU here, and make gpu is for machines with one; without a GPU there is make test" >&2; exit 1; }

resources: $(BUILD)/built $(VENV)/stamp-test
	$(ENV_PYTHON) tests/gpu/compile.py --write
	$(ENV_PYTHON) tests/gpu/cuda_resources.py --write

lint: $(VENV)/stamp-lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(FORMATTED)
	$(VENV)/bin/mypy

format: $(VENV)/stamp-lint
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(FORMATTED)

clean:
	rm -rf build dist *.egg-info fastenc/*.so .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find benchmarks examples fastenc kernels tests -name __pycache__ -prune -exec rm -r {} +

# From here on: the environment, step by step. Each leaves a stamp when it is done.

$(ENV_PYTHON):
	@command -v "$(PYTHON)" >/dev/null || { echo "fastenc: there is no $(PYTHON) here; install Python 3.10 or newer, or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "fastenc: Python 3.10 or newer is needed, and $(PYTHON) is $$("$(PYTHON)" -V 2>&1); name another: make PYTHON=python3.12" >&2; exit 1; }
	@echo "fastenc: making the environment $(VENV) with $$("$(PYTHON)" -V)"
	@"$(PYTHON)" -m venv "$(VENV)" || { rm -rf "$(VENV)"; echo "fastenc: $(PYTHON) cannot make an environment, as its venv or pip is missing; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

# Another TORCH than before: all that follows is done again.
$(TORCH_STAMP): | $(ENV_PYTHON)
	@echo "fastenc: installing $(TORCH) into $(VENV); the first time this can be a long download"
	@rm -f $(VENV)/stamp-*
	@$(PIP) install --no-compile "$(TORCH)" numpy "setuptools>=77" ninja
	@touch "$@"

# Only what is needed to import fastenc from here; the extension is built in the next step, where its output can be seen.
$(VENV)/stamp-%: pyproject.toml $(TORCH_STAMP)
	@echo "fastenc: installing fastenc[$*] into $(VENV), importing from this folder"
	@$(ENV_PYTHON) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >$(CONSTRAINT)
	@FASTENC_EXTENSION=0 $(PIP) install --no-compile --no-build-isolation -c $(CONSTRAINT) -e ".[$*]"
	@touch "$@"

$(BUILD)/built: setup.py pyproject.toml $(CXX_FILES) $(VENV)/stamp-app
	@mkdir -p $(BUILD)
	@echo "fastenc: compiling the C++ extension, a minute or two, and where nvcc is the CUDA kernels, two or three more (for one GPU alone: TORCH_CUDA_ARCH_LIST=8.0); the compilers' output is in $(BUILD)/log"
	@find build -mindepth 2 -maxdepth 2 -name built -delete # of other environments: the libraries in fastenc/ are those of the last
	@PATH="$(abspath $(VENV)/bin):$$PATH" $(ENV_PYTHON) setup.py --quiet build_ext --inplace --build-temp $(BUILD) >$(BUILD)/log 2>&1 || { tail -n 40 $(BUILD)/log; exit 1; }
	@grep "^fastenc: " $(BUILD)/log
	@if ls fastenc/_C.* >/dev/null 2>&1; then touch "$@"; else echo "fastenc: going on without it, on eager PyTorch"; fi
