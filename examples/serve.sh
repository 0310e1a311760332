#!/usr/bin/env bash
# examples/serve.sh [--port 8000] [more options of `vllm serve`]
# SmolLM2 behind vLLM's OpenAI server, on this machine only; separators, names, numbers and chat
# markers are kept. MODEL=... takes another folder, or a name on the Hub. LoRA adapters are chosen by
# requests as models; their paths, and those of other options, are relative to the repository:
#     examples/serve.sh --enable-lora --max-loras 2 --lora-modules mine=path/to/adapter
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

model=${MODEL:-build/models/SmolLM2-135M-Instruct}
if [[ ! -d $repository/$model && -d $model ]]; then
  model=$(cd "$model" && pwd)
fi
cd "$repository"
[[ ! -d $model ]] || export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" # a name is looked up on the Hub
if [[ -z ${MODEL:-} && ! -d $model ]]; then
  printf 'serve.sh: no %s: run make model, or name another with MODEL=...\n' "$model" >&2 && exit 1
fi
vllm=.venv/bin/vllm
[[ -x $vllm ]] || vllm=vllm # of the environment that is active
exec "$vllm" serve "$model" \
  --host 127.0.0.1 \
  --attention-backend sepllm \
  --additional-config '{"sepllm": {"keep": ["separators", "special", "digits", "capitalized"]}}' \
  --kv-cache-memory-bytes 536870912 \
  "$@"
