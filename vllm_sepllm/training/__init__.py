"""Training under the rule: post-training, pre-training and fine-tuning of Hugging Face models.

Needs torch and transformers, not vLLM (``pip install vllm-sepllm[train]``).
"""

from vllm_sepllm.training.attach import Attached, apply
from vllm_sepllm.training.sink_lora import apply_sink_lora

__all__ = ["Attached", "apply", "apply_sink_lora"]
