"""Queries rotated to the angles at which they meet each part of what they see."""

from sepllm_kernels.rotate_queries.reference import rotate, rotate_queries_reference
from sepllm_kernels.rotate_queries.triton import rotate_queries

__all__ = ["rotate", "rotate_queries", "rotate_queries_reference"]
