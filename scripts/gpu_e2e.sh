#!/usr/bin/env bash
# SepLLM beside vLLM's own backends on a GPU, end to end: greedy tokens against the reference, then
# throughput and latency of Llama-3-8B and Pythia-6.9B shapes (benchmarks/gpu_engine.py).
#
#     scripts/gpu_e2e.sh [SECONDS]        540 unless said otherwise; 0 is without a limit
#
# What is measured is not measured again: call it again to go on where time ran out.
# PYTHON chooses the interpreter, RESULTS the folder (build/gpu-e2e). If there is an archive of
# scripts/gpu_bundle.py (BUNDLE, build/gpu-bundle.tar.xz), vLLM comes from it.
# MODES lists what is tried, the fullest mode first ("compiled graphs eager"); a mode whose tokens
# are not there after CHECK_LIMIT seconds (180) has failed. KV_GIB gives every engine as much memory
# for its KV cache. ARCHIVE names a .tar.gz that has results and logs after every step.
# SMOKE=1: tiny shapes beside vLLM's default backend, for a machine without a GPU.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

LIMIT=${1:-540}
PYTHON=${PYTHON:-python3}
RESULTS=${RESULTS:-build/gpu-e2e}
BUNDLE=${BUNDLE:-build/gpu-bundle.tar.xz}
read -ra MODES <<<"${MODES:-compiled graphs eager}"
CHECK_LIMIT=${CHECK_LIMIT:-180}
FULL=( # model, backend, type of the KV cache: what matters most first
  "llama-3-8b SEPLLM auto" "llama-3-8b TRITON_ATTN auto" "llama-3-8b FLASH_ATTN auto"
  "llama-3-8b-crowded SEPLLM auto" "llama-3-8b-crowded FLASH_ATTN auto"
  "llama-3-8b SEPLLM fp8" "llama-3-8b-crowded SEPLLM fp8" "llama-3-8b-crowded FLASH_ATTN fp8"
  "llama-3-8b FLASH_ATTN fp8" "llama-3-8b TRITON_ATTN fp8"
  "pythia-6.9b SEPLLM auto" "pythia-6.9b TRITON_ATTN auto" "pythia-6.9b FLASH_ATTN auto"
  "pythia-6.9b SEPLLM fp8" "pythia-6.9b FLASH_ATTN fp8" "pythia-6.9b TRITON_ATTN fp8"
)
SMALL=("smoke SEPLLM auto" "smoke dense auto")

say() { printf 'gpu_e2e: %s\n' "$*"; }

out_of_time() { ((LIMIT > 0 && SECONDS >= LIMIT)); }

# A step gets the time that is left, and so many seconds at most; 0 is without a limit.
step() {
  local most=$1 left=$((LIMIT - SECONDS))
  shift
  if out_of_time; then
    return 124
  fi
  if ((LIMIT > 0 && (most == 0 || left < most))); then
    most=$left
  fi
  if ((most == 0)); then # a terminal's Ctrl-C would not pass timeout
    "$PYTHON" benchmarks/gpu_engine.py "$@"
  else
    timeout --kill-after=10 "$most" "$PYTHON" benchmarks/gpu_engine.py "$@"
  fi
}

# The archive is whole at any time.
archive() {
  if [[ -n ${ARCHIVE:-} ]]; then
    tar -czf "$ARCHIVE.new" --exclude=models -C "$RESULTS" . && mv "$ARCHIVE.new" "$ARCHIVE" ||
      say "no archive could be written"
  fi
}

# What a log says of a failure: the last line is seldom its cause.
why() {
  printf '%s\n' "$(tail -n 1 "$1")"
  grep -m 5 -E '[A-Z][A-Za-z]*(Error|Exception)\b' "$1"
}

unpack() {
  local site=build/gpu-site
  if [[ ! -f $BUNDLE ]]; then
    return
  fi
  if [[ ! $site -nt $BUNDLE ]]; then
    rm -rf "$site" && mkdir -p "$site" && tar -xJf "$BUNDLE" -C "$site" && touch "$site" || exit 1
  fi
  export PYTHONPATH=kernels:.:$site
}

# The fullest mode in which greedy tokens equal the reference's; one that failed is not tried again.
choose_mode() {
  local mode
  for mode in "${MODES[@]}"; do
    if [[ ! -f $RESULTS/check-$mode.json && ! -f $RESULTS/check-$mode.failed ]]; then
      if ! step "$CHECK_LIMIT" check "$RESULTS" --mode "$mode" >"$RESULTS/check-$mode.log" 2>&1; then
        archive
        out_of_time && say "check, $mode: no time left" && exit 1
        mv "$RESULTS/check-$mode.log" "$RESULTS/check-$mode.failed"
      fi
      archive
    fi
    if [[ -f $RESULTS/check-$mode.json ]]; then
      MODE=$mode
      return
    fi
    say "check, $mode: failed ($(why "$RESULTS/check-$mode.failed"))"
  done
  say "no mode gives the reference's tokens: nothing is measured"
  exit 1
}

main() {
  local runs=("${FULL[@]}") run name failed=0
  [[ -z ${SMOKE:-} ]] || runs=("${SMALL[@]}")
  mkdir -p "$RESULTS"
  unpack
  choose_mode
  say "check, $MODE: greedy tokens equal the reference's"
  for run in "${runs[@]}"; do
    # shellcheck disable=SC2086  # three words
    set -- $run
    name=run-$1-$2-$3
    ! grep -qs '"is_complete": true' "$RESULTS/$name.json" || continue
    if step 0 measure "$RESULTS" --mode "$MODE" --model "$1" --backend "$2" --kv "$3" \
      ${KV_GIB:+--kv-gib "$KV_GIB"} >"$RESULTS/$name.log" 2>&1; then
      say "$run: measured after $SECONDS s"
    elif out_of_time; then
      say "$run: no time left" && break
    else
      say "$run: failed ($(why "$RESULTS/$name.log"))" && failed=1
    fi
    archive
  done
  "$PYTHON" benchmarks/gpu_engine.py table "$RESULTS"
  archive
  return "$failed"
}

main
