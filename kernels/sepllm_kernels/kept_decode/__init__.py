"""Attention of a few tokens per request over the kept stream and the window."""

from sepllm_kernels.kept_decode.reference import kept_attention_reference
from sepllm_kernels.kept_decode.triton import DecodeBuffers, kept_decode, make_plan, plan_for

__all__ = ["DecodeBuffers", "kept_attention_reference", "kept_decode", "make_plan", "plan_for"]
