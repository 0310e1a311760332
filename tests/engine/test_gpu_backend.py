"""What the GPU backend refuses of a layer."""

from types import SimpleNamespace

import pytest
import torch

from vllm_sepllm.engine import gpu_backend

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    ("soft_cap", "dtype", "said"),
    [
        (30.0, torch.bfloat16, "no soft cap of logits, and this model's is 30.0"),
        (0.0, torch.float32, "no kernel for float32"),
        (0.0, torch.bfloat16, None),
    ],
)
def test_layers_xformers_does_not_take(monkeypatch, soft_cap, dtype, said):
    cuda = SimpleNamespace(is_cuda=lambda: True)
    monkeypatch.setattr(gpu_backend, "current_platform", cuda)
    layer = SimpleNamespace(logits_soft_cap=soft_cap)
    assert gpu_backend.SepLLMGPUImpl._xformers_refusal(layer, dtype) == said
