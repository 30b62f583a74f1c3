#!/usr/bin/env bash
# Builds the emulated kernels: bash csrc/simt/build.sh BUILD_FOLDER [cmake options]; see CMakeLists.txt.
set -euo pipefail
build=$1
shift
cmake -G Ninja -S "$(dirname "${BASH_SOURCE[0]}")" -B "$build" -DPython_EXECUTABLE="$(command -v python3)" "$@" >/dev/null
cmake --build "$build"
