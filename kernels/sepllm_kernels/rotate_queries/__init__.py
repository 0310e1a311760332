"""Queries turned to the angles at which they meet each part of what they see."""

from sepllm_kernels.turn_queries.reference import rotate, turn_queries_reference
from sepllm_kernels.turn_queries.triton import turn_queries

__all__ = ["rotate", "turn_queries", "turn_queries_reference"]
