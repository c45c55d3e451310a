# make demo   two fine-tuned experts, merged in every way, compared in one table
# make test   the whole test suite; the CUDA sources run on the host shim, no GPU needed
# make test-cutlass   CUTLASS's kernels in the interpreter of PTX (needs nvcc)
# make test-gpu, bench-gpu   the tests and the benches on this machine's GPU (needs driver and nvcc)
# All make .venv first, install what they need there and build the extension in the source tree.
#
# Variables: PYTHON (python3), TORCH (torch==2.13.0; a requirement or a wheel's path),
# PIP_INSTALL_ARGS, PYTEST_ARGS, DEMO_ARGS, BENCH_ARGS, WORKERS (2), and the switches at the top of setup.py.

PYTHON ?= python3
TORCH ?= torch==2.13.0
BUILD_REQUIREMENTS ?= setuptools>=77 wheel pybind11 ninja cmake numpy
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet $(PIP_INSTALL_ARGS)
C_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
BUILD_SOURCES := $(C_SOURCES) CMakeLists.txt setup.py mergeme_ext/_version.py
# A stamp for each way to build: other switches than last time mean another (incremental) build.
SWITCHES := $(shell echo '$(MERGEME_CUDA) $(MERGEME_PTX) $(TORCH_CUDA_ARCH_LIST) $(MERGEME_CMAKE_ARGS) $(DEBUG)' | cksum | cut -d' ' -f1)
BUILT := $(VENV)/.built-$(SWITCHES)
BUILT_SIMT := $(VENV)/.built-simt-$(SWITCHES)

# Busy-waiting OpenMP threads make torch many times slower when anything else runs.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test test-mutations test-cutlass test-gpu bench-gpu lint format build sanitize wheel-check clean
.DELETE_ON_ERROR:

demo: $(BUILT) $(VENV)/.demo
	$(BIN)/python -m mergeme_ext demo $(DEMO_ARGS)

test: $(BUILT_SIMT) $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) $(PYTEST_ARGS)

# With a GPU: refused without one, before anything is installed; then everything is built for it.
# Both start make again, with the architecture among the build's switches.
test-gpu bench-gpu:
	@$(PYTHON) -m benchmarks.gpu_machine
	$(MAKE) .$@ MERGEME_CUDA=1 TORCH_CUDA_ARCH_LIST="$$($(PYTHON) -m benchmarks.gpu_machine --architectures)"

# All tests, those on the GPU among them; then the ops' small ones under compute-sanitizer's tools.
.PHONY: .test-gpu .bench-gpu
.test-gpu .bench-gpu: export MERGEME_CUDA TORCH_CUDA_ARCH_LIST
.test-gpu: $(BUILT_SIMT) $(VENV)/.test
	$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make: torch has no CUDA, or its driver is too old; say TORCH=...")'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m gpu $(PYTEST_ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not gpu" -n $(WORKERS) $(PYTEST_ARGS)
	@command -v compute-sanitizer >/dev/null || \
	  { echo "make: no compute-sanitizer on the PATH (it is in the CUDA toolkit); left out"; exit 0; }; \
	for tool in memcheck racecheck synccheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 OMP_NUM_THREADS=1 compute-sanitizer --tool $$tool --error-exitcode 9 \
	    $(BIN)/python -m pytest -q -m "gpu and not slow" -k matches_reference python_tests/ops || exit 1; \
	done

.bench-gpu: $(BUILT) $(VENV)/.test
	$(BIN)/python -m benchmarks.bench_experts_gpu --jsonl experts_gpu.jsonl $(BENCH_ARGS)
	for op in grouped_matmul grouped_experts topk_gating sort_by_expert merge_task_vectors; do \
	  $(BIN)/python -m benchmarks.bench_$$op --device cuda || exit 1; \
	done

# Kernels with one barrier, wait or fence less: each is noticed, or explained. Some minutes.
test-mutations: $(BUILT_SIMT) $(VENV)/.test
	MERGEME_MUTATIONS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) \
	  python_tests/ptx/test_mutations.py $(PYTEST_ARGS)

# CUTLASS's kernels in the interpreter of PTX, with the headers of the package nvidia-cutlass.
test-cutlass: $(BUILT_SIMT) $(VENV)/.test
	$(PIP) --no-deps nvidia-cutlass==4.2.0.0
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q python_tests/ptx/test_cutlass.py $(PYTEST_ARGS)

build: $(BUILT)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(C_SOURCES)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(C_SOURCES)

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $(PYTHON) is older than Python 3.11; say PYTHON=python3.x"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH) and the build's requirements into $(VENV)"
	$(PIP) "$(TORCH)" $(foreach r,$(BUILD_REQUIREMENTS),"$(r)")
	@touch $@

$(BUILT): $(VENV)/.torch $(BUILD_SOURCES)
	$(BIN)/python setup.py build_ext --inplace
	@rm -f $(VENV)/.built*
	@touch $@

$(BUILT_SIMT): $(VENV)/.torch $(BUILD_SOURCES)
	MERGEME_SIMT=1 $(BIN)/python setup.py build_ext --inplace
	@rm -f $(VENV)/.built*
	@touch $(BUILT) $@

# Editable: the package in the source tree with its requirements, and the command mergeme.
$(VENV)/.demo $(VENV)/.test $(VENV)/.dev: $(VENV)/.%: $(VENV)/.torch pyproject.toml | $(BUILT)
	@echo "installing what $* needs into $(VENV)"
	$(PIP) --no-build-isolation -e '.[$*]'
	@touch $@

# The CUDA sources on the host under UBSan and ASan, built apart from the package.
sanitize: $(BUILT_SIMT) $(VENV)/.test
	for s in undefined address; do \
	  MERGEME_CUDA=0 MERGEME_SIMT=1 MERGEME_CMAKE_ARGS="$(MERGEME_CMAKE_ARGS) -DMERGEME_SANITIZE=$$s" \
	    $(BIN)/python setup.py build_ext --build-temp build/$$s --build-lib build/$$s/lib || exit 1; \
	  preload=; test $$s = undefined || \
	    preload="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)"; \
	  MERGEME_SIMT_MODULE=$$(echo build/$$s/lib/mergeme_ext/_simt.*.so) OMP_NUM_THREADS=1 \
	    LD_PRELOAD="$$preload" ASAN_OPTIONS=detect_leaks=0 \
	    $(BIN)/python -m pytest -q -n $(WORKERS) python_tests/simt python_tests/ops -k simt \
	      -m "not slow" || exit 1; \
	done

# The package as a user installs it: built as a wheel, unpacked elsewhere, imported.
wheel-check: $(VENV)/.torch
	rm -rf build/wheel-check
	$(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-build-isolation --no-deps \
	  --wheel-dir build/wheel-check .
	$(BIN)/python -m zipfile -e build/wheel-check/*.whl build/wheel-check/unpacked
	cd build/wheel-check/unpacked && PYTHONPATH=. ../../../$(BIN)/python -c \
	  'import mergeme_ext, os; assert mergeme_ext.__file__.startswith(os.getcwd()); print(mergeme_ext._load._C.build_info())'

clean:
	rm -rf $(VENV) build demo-output mergeme_ext/*.so mergeme_ext/_ptx *.egg-info
