"""Attention of a few tokens per request over the kept stream and the window."""

from sepllm_kernels.paged.decode.triton import DecodeBuffers, kept_decode, make_plan, plan_for
from sepllm_kernels.paged.reference import kept_attention_reference

__all__ = ["DecodeBuffers", "kept_attention_reference", "kept_decode", "make_plan", "plan_for"]
