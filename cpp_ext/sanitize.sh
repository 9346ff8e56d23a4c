#!/usr/bin/env bash
# Builds the test program with every warning an error and runs it under AddressSanitizer and UBSan, then under ThreadSanitizer.
# Needs cmake and a C++ compiler; sanitize.sh <folder> builds there instead of in build/.
set -euo pipefail
cd "$(dirname "$0")"
build="${1:-../build}"
for preset in sanitize thread-sanitize; do
  cmake --preset "$preset" -B "$build/$preset" >/dev/null
  cmake --build "$build/$preset" --parallel 2
  UBSAN_OPTIONS=print_stacktrace=1 "$build/$preset/embedding_test"
done
