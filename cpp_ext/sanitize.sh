#!/usr/bin/env bash
# Builds the extension and the test program with every warning an error, and runs the program under AddressSanitizer and UBSan, then
# under ThreadSanitizer. Needs cmake, a C++ compiler, and pybind11 for the python that is found first; sanitize.sh <folder> builds
# there instead of in build/.
set -euo pipefail
cd "$(dirname "$0")"
build="${1:-../build}"
cmake --preset developer -B "$build/developer" -DPython_EXECUTABLE="$(command -v python)" \
  -Dpybind11_DIR="$(python -m pybind11 --cmakedir)" >/dev/null
cmake --build "$build/developer" --parallel 2
for preset in sanitize thread-sanitize; do
  cmake --preset "$preset" -B "$build/$preset" >/dev/null
  cmake --build "$build/$preset" --parallel 2
  UBSAN_OPTIONS=print_stacktrace=1 "$build/$preset/embedding_test"
done
