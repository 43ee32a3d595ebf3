#!/usr/bin/env bash
# All that needs a GPU, in ten minutes: the extension with its CUDA kernels, the tests, checkers of memory and of races,
# the benchmarks.
#
#     bench/gpu.sh [FOLDER]        the figures go to FOLDER/DATE-GPU/gpu.json, by default in bench/results
#
# Each stage has a limit, and a stage that fails keeps none of the others from running; the exit status tells. PYTHON
# names the interpreter; COMMIT says what is measured where git cannot.
set -uo pipefail
shopt -s nullglob
[ $# -eq 0 ] || results=$(realpath --canonicalize-missing "$1")
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
results=${results:-bench/results}
total=585 # seconds
failed=()

# Those whose kernels run on a GPU where there is one, and what they rest on; the others ask what a CPU answers.
tests=(tests/test_gpu.py tests/test_linear_logprobs_gpu.py tests/test_*triton*.py tests/test_fused*.py)
tests+=(tests/test_linear_logprobs_kernels.py tests/test_impl.py tests/test_autograd.py tests/test_compile.py tests/test_equivalence.py)

# stage NAME LIMIT COMMAND...: at most LIMIT seconds, then an interrupt, so that what ran by then is reported
stage() {
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  printf '\n== %s: %s\n' "$name" "$*"
  timeout --signal=INT --kill-after=10 "$limit" "$@"
  status=$?
  printf '== %s: status %d after %d of %d s\n' "$name" "$status" $((SECONDS - start)) "$limit"
  [ "$status" -eq 0 ] || failed+=("$name")
}

export MAX_JOBS=${MAX_JOBS:-$(nproc)} PYTHONUNBUFFERED=1
stage install 150 env LATRO_CUDA=1 "$python" -m pip install --quiet --no-build-isolation --no-deps -e .
stage kernels 30 "$python" -m latro_kernels

# With the warnings of this machine's libraries, which CI has never seen, as warnings.
options=(-q --tb=short --maxfail=40 -W default -p no:cacheprovider -p no:benchmark)
if "$python" -c 'import xdist' 2>/dev/null; then
  options+=(-n 8) # most of the time is Triton's compiler
fi
stage tests 180 "$python" -m pytest "${options[@]}" "${tests[@]}"

# sanitize TOOL TESTS: without torch's cache, memory past the end of a tensor belongs to nobody
sanitize() {
  stage "$1" 80 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$1" --error-exitcode 1 --print-limit 5 \
    "$python" -m pytest -q --tb=short -W default -p no:cacheprovider tests/test_gpu.py -k "$2"
}

sanitizer=$(PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin command -v compute-sanitizer)
if [ "$sanitizer" ]; then
  sanitize memcheck "small_ragged and bfloat16 or native_self_reward and k1"
  sanitize racecheck "small_ragged and bfloat16 and native and not fused or native_self_reward and k1" # it does not know TMA
else
  printf '\n== memcheck, racecheck: passed over, compute-sanitizer is neither on PATH nor in the CUDA toolkit\n'
fi

left=$((total - SECONDS))
stage benchmarks "$left" "$python" -m bench.gpu --save --seconds $((left - 10)) --results "$results" ${COMMIT:+--commit "$COMMIT"}

if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all stages passed in $SECONDS s"
