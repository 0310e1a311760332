"""How a decode step is cut into pieces of about the same size."""

from sepllm_kernels.paged.decode_plan.reference import decode_plan_reference
from sepllm_kernels.paged.decode_plan.triton import DecodePlan, decode_plan

__all__ = ["DecodePlan", "decode_plan", "decode_plan_reference"]
