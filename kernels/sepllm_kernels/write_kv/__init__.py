"""Both copies of a step's keys and values."""

from sepllm_kernels.write_kv.reference import write_kv_reference
from sepllm_kernels.write_kv.triton import write_kv

__all__ = ["write_kv", "write_kv_reference"]
