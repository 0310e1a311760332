#!/usr/bin/env bash
# examples/serve.sh [--port 8000] [more options of `vllm serve`]
# SmolLM2 behind vLLM's OpenAI server, on this machine only; separators, names, numbers and chat
# markers are kept. MODEL=... takes another model. LoRA adapters are chosen by requests as models:
#     examples/serve.sh --enable-lora --max-loras 2 --lora-modules mine=path/to/adapter
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
exec .venv/bin/vllm serve "${MODEL:-build/models/SmolLM2-135M-Instruct}" \
  --host 127.0.0.1 \
  --attention-backend sepllm \
  --additional-config '{"sepllm": {"keep": ["separators", "special", "digits", "capitalized"]}}' \
  --kv-cache-memory-bytes 536870912 \
  "$@"
