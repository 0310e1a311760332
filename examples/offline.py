# .venv/bin/python examples/offline.py    (after make model)
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
from vllm import LLM, SamplingParams

MODEL = Path(__file__).parent.parent / "build/models/SmolLM2-135M-Instruct"

if __name__ == "__main__":  # vLLM starts processes that import this file again
    llm = LLM(
        str(MODEL),
        attention_backend="sepllm",
        additional_config={"sepllm": {"window_size": 256}},
        max_model_len=2048,
        enforce_eager=True,  # the model is too small for compiling to pay
        kv_cache_memory_bytes=2**28,
    )
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    [output] = llm.chat(messages, SamplingParams(temperature=0, max_tokens=40))
    print(output.outputs[0].text)
