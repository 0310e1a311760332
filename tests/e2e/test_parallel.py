"""Two tensor-parallel ranks or pipeline stages give the tokens of one process.

Kept sets follow from token ids, so the ranks need no agreement about them.
"""

import json
import os
import subprocess
import sys

import pytest
from helpers import MODEL

from vllm_sepllm.reference import first_difference

pytestmark = pytest.mark.e2e

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(
        sys.argv[1],
        attention_backend="sepllm",
        additional_config={"sepllm": {"window_size": 64}},
        dtype="float32",
        max_model_len=2048,
        max_num_batched_tokens=256,
        kv_cache_memory_bytes=64 << 20,
        **json.loads(sys.argv[2]),
    )
    prompts = [{"prompt_token_ids": ids} for ids in json.load(sys.stdin)]
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    for _ in range(2):
        outputs = llm.generate(prompts, params, use_tqdm=False)
        answer = [[list(o.outputs[0].token_ids), o.num_cached_tokens] for o in outputs]
        print("ANSWER", json.dumps(answer))
"""


WAYS = {
    "ranks": {"tensor_parallel_size": 2, "enforce_eager": True},
    # Stages need compilation on CPU, in vLLM itself.
    "stages": {"pipeline_parallel_size": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_two_processes(book, reference_model, separator_ids, tmp_path, way):
    prompts = [book[:1100], book[100:102], book[3000:3342]]
    script = tmp_path / "two_processes.py"
    script.write_text(SCRIPT)
    env = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    env |= {"VLLM_CPU_OMP_THREADS_BIND": "0|1" if len(os.sched_getaffinity(0)) > 1 else "nobind"}
    result = subprocess.run(
        [sys.executable, str(script), MODEL, json.dumps(WAYS[way])],
        input=json.dumps(prompts),
        capture_output=True,
        text=True,
        timeout=400,
        env=env,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [line for line in result.stdout.splitlines() if line.startswith("ANSWER")]
    cold, warm = (json.loads(line.removeprefix("ANSWER")) for line in lines)
    for prompt, (tokens, cached), (again, found) in zip(prompts, cold, warm, strict=True):
        assert len(tokens) == 24
        assert first_difference(reference_model, prompt, tokens, separator_ids, 4, 64) is None
        assert tokens == again
        assert cached == 0
        assert found == (len(prompt) - 1) // 32 * 32
