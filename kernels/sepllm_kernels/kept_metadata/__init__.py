"""Which tokens of a step are kept, where they go and what each token sees of the stream."""

from sepllm_kernels.kept_metadata.reference import kept_metadata_reference
from sepllm_kernels.kept_metadata.triton import kept_metadata

__all__ = ["kept_metadata", "kept_metadata_reference"]
