"""Two pipeline stages give the tokens of one process.

Kept sets follow from token ids, so processes need no agreement about them. Ranks of tensor
parallelism: in test_serve_processes.py behind a server, in test_ray.py in cache positions.
"""

import json
import os
import subprocess
import sys

import pytest
import two_processes

from vllm_sepllm.oracle.dense_mask import first_difference

pytestmark = pytest.mark.e2e

LAYERS, DENSE = 4, [0, 3]  # one of each stage is dense
# Not eager: stages need compilation on CPU, in vLLM itself. Traced, that is; code is not generated.
STAGES = {"pipeline_parallel_size": 2, "sepllm": {"dense_layers": DENSE}}
STAGES["compilation_config"] = {"backend": "eager"}


def test_two_stages(book, first_layers, separator_ids, tmp_path):
    model, folder = first_layers(LAYERS)
    prompts = [book[:1100], book[100:102], book[3000:3342]]
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(prompts))
    env = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    env |= {"VLLM_CPU_OMP_THREADS_BIND": "0|1" if len(os.sched_getaffinity(0)) > 1 else "nobind"}
    result = subprocess.run(
        [
            sys.executable,
            two_processes.__file__,
            str(path),
            json.dumps({**STAGES, "model": folder}),
        ],
        capture_output=True,
        text=True,
        timeout=400,
        env=env,
    )
    assert result.returncode == 0, result.stderr[-3000:]

    def check(prompt, tokens):
        mask = separator_ids, 4, 64
        assert first_difference(model, prompt, tokens, *mask, DENSE) is None

    two_processes.check(result.stdout, prompts, check)
