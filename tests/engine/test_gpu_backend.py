"""What the GPU backend asks for, and what it refuses of a layer."""

from types import SimpleNamespace

import pytest
import torch

from vllm_sepllm.config import ConfigError
from vllm_sepllm.engine.gpu import backend as gpu_backend
from vllm_sepllm.engine.worker.worker import SepLLMWorker

pytestmark = pytest.mark.engine

BF16 = torch.bfloat16


def test_layout_of_pages():
    """Beside dense layers too, which run vLLM's Triton backend; others can be asked for."""
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
    from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts
    from vllm.v1.kv_cache_layout import KVCacheLayout

    ours = gpu_backend.SepLLMGPUBackend, gpu_backend.KeptGPUBackend
    found = get_supported_kv_cache_layouts([*ours, TritonAttentionBackend])
    assert found[0] is KVCacheLayout.LBHNC
    assert set(found) == set(KVCacheLayout)


def test_stages_agree_on_the_layout_of_pages(monkeypatch):
    """One may have dense layers alone, whose backend says nothing of layouts."""
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
    from vllm.v1.attention.backends.utils import (
        get_supported_kv_cache_layouts,
        resolve_kv_cache_layout,
    )

    class Base:
        def get_supported_kv_cache_layouts(self):
            return [layout.name for layout in get_supported_kv_cache_layouts(self.backends)]

    class Stage(SepLLMWorker, Base):
        def __init__(self, size, *backends):
            self.parallel_config = SimpleNamespace(pipeline_parallel_size=size)
            self.backends = backends

    ours = gpu_backend.SepLLMGPUBackend, gpu_backend.KeptGPUBackend
    stages = Stage(2, *ours, TritonAttentionBackend), Stage(2, TritonAttentionBackend)
    cache = SimpleNamespace(kv_cache_layout=None, get_resolved_kv_cache_layout=None)
    config = SimpleNamespace(cache_config=cache, kv_transfer_config=None)
    found = resolve_kv_cache_layout(config, [s.get_supported_kv_cache_layouts() for s in stages])
    assert found.name == "LBHNC"
    assert len(Stage(1, *ours).get_supported_kv_cache_layouts()) > 1


@pytest.mark.parametrize("cache_dtype", ["auto", "fp8_e4m3"])
@pytest.mark.parametrize("eager", [False, True])
def test_weights_are_not_loaded_below_captured_scales(cache_dtype, eager):
    loaded = []

    class Base:
        def reload_weights(self, *args, **kwargs):
            loaded.append((args, kwargs))

    class Worker(SepLLMWorker, Base):
        cache_config = SimpleNamespace(cache_dtype=cache_dtype)
        model_config = SimpleNamespace(enforce_eager=eager)

    if cache_dtype == "auto" or eager:
        Worker().reload_weights(1, weights_path="x")
        assert loaded == [((1,), {"weights_path": "x"})]
    else:
        with pytest.raises(ConfigError, match="captured graphs keep the scales"):
            Worker().reload_weights()
        assert not loaded


def test_buffers_end_with_their_layers(monkeypatch):
    """Layers of one shape share them, and none outlives an engine: in sleep mode vLLM refuses to
    load another one while something of the first is allocated."""
    monkeypatch.setattr(gpu_backend, "processors", lambda device: 4)
    sizes = 1, 8, 2, 64, torch.device("cpu")
    one, other = gpu_backend.shared_buffers(*sizes), gpu_backend.shared_buffers(*sizes)
    assert one is other
    assert gpu_backend.shared_buffers(2, *sizes[1:]) is not one
    del one, other
    assert not gpu_backend._buffers


@pytest.mark.parametrize(
    ("soft_cap", "dtype", "num_drafts", "built_for", "said"),
    [
        (30.0, BF16, 0, True, "no soft cap of logits, and this model's is 30.0"),
        (0.0, torch.float32, 0, True, "no kernel for float32"),
        (0.0, BF16, 16, True, "no way to verify 16 draft tokens, at most 15 with this model"),
        (0.0, BF16, 15, False, "no kernel for torch.bfloat16 on this GPU .*torch's is None\\)"),
        (0.0, BF16, 15, True, None),
    ],
)
def test_layers_xformers_does_not_take(monkeypatch, soft_cap, dtype, num_drafts, built_for, said):
    pytest.importorskip("xformers", reason="xformers is not installed")
    from sepllm_kernels.paged.prefill import xformers_window

    asked = []

    def has_kernel(*about):
        asked.append(about)
        return built_for

    monkeypatch.setattr(xformers_window, "has_kernel", has_kernel)
    cuda = SimpleNamespace(is_cuda=lambda: True)
    monkeypatch.setattr(gpu_backend, "current_platform", cuda)
    monkeypatch.setattr(gpu_backend, "max_decode_query_len", lambda config: num_drafts + 1)
    settings = SimpleNamespace(config=SimpleNamespace(prefill_kernel="xformers"))
    monkeypatch.setattr(gpu_backend.Settings, "of", lambda config: settings)
    config = SimpleNamespace(model_config=SimpleNamespace(dtype=dtype))
    layer = SimpleNamespace(_k_scale=torch.ones(()))
    impl = gpu_backend.SepLLMGPUImpl.__new__(gpu_backend.SepLLMGPUImpl)
    impl.num_heads, impl.num_kv_heads, impl.head_size = 32, 8, 128
    impl.logits_soft_cap, impl._buffers = soft_cap, None
    if said:
        with pytest.raises(ConfigError, match=f"prefill_kernel='xformers' has {said}: leave it"):
            impl.prepare(config, layer)
    else:
        impl.prepare(config, layer)
        assert impl._uses_xformers
        assert asked == [(32, 8, 128, BF16, torch.device("cpu"))]
