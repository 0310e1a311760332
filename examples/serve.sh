#!/usr/bin/env bash
# examples/serve.sh [--port 8000] [more options of `vllm serve`]
# The demo model behind vLLM's OpenAI server, on this machine only. Its tokenizer has no chat
# template, so a plain one is given.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
exec .venv/bin/vllm serve examples/models/pg19-5m-sep \
  --served-model-name pg19-5m-sep \
  --host 127.0.0.1 \
  --attention-backend sepllm \
  --additional-config '{"sepllm": {"window_size": 64}}' \
  --max-model-len 2048 \
  --kv-cache-memory-bytes 268435456 \
  --chat-template examples/chat_template.jinja \
  "$@"
