#!/usr/bin/env bash
# The native kernels under AddressSanitizer and UBSan, those in CUDA in their emulator: builds a copy of the project in a
# temporary folder and runs their tests there, the fuzzer on every instruction set. Takes minutes; needs GCC.
set -euo pipefail
cd "$(dirname "$0")/.."

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
git ls-files -z --cached --others --exclude-standard | tar --create --null --files-from - | tar --extract -C "$scratch"
cd "$scratch"

export CC=gcc CXX=g++ LATRO_CUDA=0
# Python's own -fwrapv would hide signed overflows.
export CFLAGS="-g -fno-wrapv -fsanitize=address,undefined -fno-sanitize-recover=undefined" LDFLAGS="-fsanitize=address,undefined"
libraries=()
for name in libasan.so libubsan.so libstdc++.so; do
  libraries+=("$("$CXX" -print-file-name="$name")")
done

run() {
  printf '\n== %s\n' "$*"
  env "$@"
}

run python setup.py --quiet build_ext --inplace
export CXXFLAGS="$CFLAGS" LD_PRELOAD="${libraries[*]}" ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0:max_malloc_fill_size=1000000000:malloc_fill_byte=255 UBSAN_OPTIONS=print_stacktrace=1
# The tests of the size of errors run the same code on the same shapes, many times.
run pytest --quiet -k "not error" tests/test_*_native.py tests/test_self_reward.py
run pytest --quiet tests/test_emulator.py tests/test_linear_logprobs_cuda.py tests/test_product_sm90.py
for set in $(python -c 'import torch, latro_kernels; print(torch.ops.latro_kernels.instruction_sets().replace(",", " "))'); do
  run LATRO_CPU="$set" pytest --quiet tests/test_fuzz.py
done
