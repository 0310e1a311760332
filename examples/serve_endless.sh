#!/usr/bin/env bash
# examples/serve_endless.sh [--port 8000] [more options of `vllm serve`]
# The demo model, made for 2,048 positions, with texts of up to a million tokens: a query sees 4
# sinks, the newest 64 separators and a window of 256 tokens, numbered from 0. Its tokenizer has no
# chat template, so a plain one is given.
set -euo pipefail

export MODEL="${MODEL:-examples/models/pg19-5m-sep}"
exec "$(dirname "${BASH_SOURCE[0]}")/serve.sh" \
  --max-model-len 1048576 \
  --kv-cache-memory-bytes 268435456 \
  --enable-prompt-tokens-details \
  --additional-config '{"sepllm": {"window_size": 256, "max_separator_tokens": 64, "position_mode": "cache"}}' \
  --chat-template examples/chat_template.jinja \
  "$@"
