"""Two tensor-parallel ranks or pipeline stages give the tokens of one process.

Kept sets follow from token ids, so the ranks need no agreement about them. Ranks in positions of
the text: test_ray.py, and test_serve_processes.py behind a server.
"""

import json
import os
import subprocess
import sys

import pytest
import two_processes
from helpers import CacheReference

from vllm_sepllm.oracle.dense_mask import first_difference

pytestmark = pytest.mark.e2e

WAYS = {
    # Stages need compilation on CPU, in vLLM itself.
    "stages with a dense layer each": {
        "pipeline_parallel_size": 2,
        "sepllm": {"dense_layers": [0, 5]},
    },
    "ranks in cache positions": {
        "tensor_parallel_size": 2,
        "enforce_eager": True,
        "sepllm": {"position_mode": "cache", "max_separator_tokens": 20},
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_two_processes(book, reference_model, separator_ids, tmp_path, way):
    prompts = [book[:1100], book[100:102], book[3000:3342]]
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(prompts))
    env = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    env |= {"VLLM_CPU_OMP_THREADS_BIND": "0|1" if len(os.sched_getaffinity(0)) > 1 else "nobind"}
    result = subprocess.run(
        [sys.executable, two_processes.__file__, str(path), json.dumps(WAYS[way])],
        capture_output=True,
        text=True,
        timeout=400,
        env=env,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    sepllm = WAYS[way].get("sepllm", {})

    def check(prompt, tokens):
        if sepllm.get("position_mode") == "cache":
            bound = sepllm["max_separator_tokens"]
            CacheReference(reference_model, separator_ids, 4, 64, bound).check(prompt, tokens)
            return
        arguments = reference_model, prompt, tokens, separator_ids, 4, 64
        assert first_difference(*arguments, sepllm.get("dense_layers", ())) is None

    two_processes.check(result.stdout, prompts, check)
