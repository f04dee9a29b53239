#!/usr/bin/env bash
# Builds the kernels with the address and undefined behaviour sanitizers, and with the tile operations of AMX computed in plain
# C++, and runs their tests with this build: `make sanitize`, or PYTHON=... tests/native/sanitize.sh [arguments of pytest].
# Needs gcc with its sanitizer libraries, cmake, and a Python that has nanobind and what the tests need.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-python3}
BUILD=build/sanitize

cmake -S . -B "$BUILD" -DPython_EXECUTABLE="$(command -v "$PYTHON")" -DCMAKE_BUILD_TYPE=RelWithDebInfo \
  -DHF_SPARSE_SANITIZE=ON -DHF_SPARSE_EMULATE_TILES=ON
cmake --build "$BUILD" --parallel 2

# Python itself is not built with the sanitizers, so their library has to be there before everything else. Python never frees
# some of its memory, hence no search for leaks.
export HF_SPARSE_TEST_KERNELS=$(ls "$PWD/$BUILD"/_kernels*.so)
export LD_PRELOAD=$("${CXX:-g++}" -print-file-name=libasan.so):$("${CXX:-g++}" -print-file-name=libubsan.so)
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1
exec "$PYTHON" -m pytest tests/test_native.py tests/test_native_buffers.py tests/test_native_gather.py tests/test_native_rows.py tests/test_storage.py -p no:cacheprovider "$@"
