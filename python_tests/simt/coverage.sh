#!/usr/bin/env bash
# Line coverage of the CUDA kernels by their tests under emulation: prints it for each file of csrc/cuda, and fails
# below 95 %. Needs gcovr (pip install ".[dev]") and the installed package.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

find build/simt-coverage -name '*.gcda' -delete 2>/dev/null || true  # counts add up from run to run
# Broken copies and the build with sanitizers have libraries of their own.
CERBERUS_SIMT=required CERBERUS_SIMT_BUILD=coverage python -m pytest -q -m '' python_tests/simt \
  --ignore python_tests/simt/test_broken_kernels.py --ignore python_tests/simt/test_sanitizers.py
gcovr build/simt-coverage --root . --filter 'csrc/cuda/.*\.cuh?$' --markdown - \
  --gcov-executable "${GCOV:-gcov}" --fail-under-line 95
