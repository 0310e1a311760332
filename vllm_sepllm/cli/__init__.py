"""The command ``vllm-sepllm``."""
