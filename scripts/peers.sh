#!/usr/bin/env bash
# build/peers: kvpress on top of what .venv holds, with the older Transformers that it needs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

KVPRESS=0.5.5
STAMP=build/peers/kvpress-$KVPRESS
[[ ! -f $STAMP ]] || exit 0
.venv/bin/python -m venv --clear build/peers
site=$(build/peers/bin/python -c 'import site; print(site.getsitepackages()[0])')
.venv/bin/python -c 'import site; print(site.getsitepackages()[0])' >"$site/beneath.pth"
build/peers/bin/python -m pip install -qq --no-compile --disable-pip-version-check \
  --no-warn-conflicts "kvpress==$KVPRESS"
touch "$STAMP"
