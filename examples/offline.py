# .venv/bin/python examples/offline.py
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
from vllm import LLM, SamplingParams

if __name__ == "__main__":  # vLLM starts processes that import this file again
    llm = LLM(
        "examples/models/pg19-5m-sep",
        attention_backend="sepllm",
        additional_config={"sepllm": {"window_size": 64}},
        max_model_len=2048,
        enforce_eager=True,  # the demo model is too small for compiling to pay
        kv_cache_memory_bytes=2**28,
    )
    prompt = "It was late in the evening when she came back to the house, and"
    [output] = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=60))
    print(prompt + output.outputs[0].text)
