#!/usr/bin/env bash
# Two tasks of lm-eval (examples/lm_eval) with full attention and under SepLLM, offline.
#
#     pip install 'lm-eval>=0.4.13'
#     examples/lm_eval.sh MODEL [SEPLLM_OPTIONS [LM_EVAL_OPTIONS...]]
#     examples/lm_eval.sh build/models/SmolLM2-135M-Instruct '{"preset": "facts"}' --limit 50
#
# Results stand in OUTPUT, or build/lm-eval. ENGINE='{"tensor_parallel_size": 2}' gives vLLM more
# arguments, ONLY=sepllm or ONLY=full leaves the other out, and TASKS names other tasks. With a
# network, these are worth a look:
#
#     TASKS=mmlu examples/lm_eval.sh MODEL '{}' --num_fewshot 5
#     TASKS=longbench examples/lm_eval.sh MODEL        # pip install 'lm-eval[longbench]'
#     TASKS=ruler examples/lm_eval.sh MODEL '{}' --metadata '{"max_seq_lengths": [8192]}'
#                                                      # pip install 'lm-eval[ruler]'
set -euo pipefail
folder=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

model=${1:?"name a model, e.g. examples/lm_eval.sh build/models/SmolLM2-135M-Instruct"}
options=${2:-'{}'}
shift $(($# < 2 ? $# : 2))
python=${PYTHON:-$folder/.venv/bin/python}
command -v "$python" >/dev/null || python=python3
if ! "$python" -c 'import lm_eval' 2>/dev/null; then
  printf "lm_eval.sh: %s has no lm-eval: pip install 'lm-eval>=0.4.13'\n" "$python" >&2
  exit 1
fi
[[ ! -d $model ]] || model=$(cd "$model" && pwd)
case ${ONLY:-} in "" | full | sepllm) ;; *)
  printf 'lm_eval.sh: ONLY=%s: must be full or sepllm\n' "$ONLY" >&2
  exit 1
  ;;
esac
output=$(realpath -m "${OUTPUT:-$folder/build/lm-eval}")
[[ $python != */* ]] || python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
cd "$folder" # paths in the tasks are relative to it

# Arguments as JSON: lm-eval cuts the form a=b,c=d at every comma.
arguments() {
  "$python" - "$model" "$1" "${ENGINE:-}" <<'END'
import json
import sys


def read(name, text):
    try:
        return json.loads(text)
    except ValueError as error:
        sys.exit(f"lm_eval.sh: {name} {text!r} is no JSON ({error}): give an object")


model, options, engine = sys.argv[1:]
arguments = {"pretrained": model, "dtype": "auto", **read("ENGINE", engine or "{}")}
if options:
    arguments |= {
        "attention_backend": "sepllm",
        "additional_config": {"sepllm": read("the second argument", options)},
    }
print(json.dumps(arguments))
END
}

run() {
  local name=$1 given
  [[ ${ONLY:-$name} == "$name" ]] || return 0
  given=$(arguments "$2")
  printf '\n%s\n' "$name"
  "$python" -m lm_eval run --model vllm --model_args "$given" --include_path examples/lm_eval \
    --batch_size auto --tasks "${TASKS:-sepllm_gsm8k,sepllm_book}" --output_path "$output/$name" "${@:3}"
}

arguments "$options" >/dev/null # refused before anything takes long
run full "" "$@"
run sepllm "$options" "$@"
