"""What can be known of the CUDA platform without a GPU: configurations and selection."""

import sys
from types import ModuleType

import pytest
import torch
from helpers import MODEL
from vllm.utils.import_utils import resolve_obj_by_qualname

pytestmark = pytest.mark.engine


@pytest.fixture
def platform(monkeypatch):
    """Our CUDA platform on an H200 that answers no other question."""
    if not torch.cuda.is_available():  # imported for its side effects, which need a GPU
        name = "vllm._C_stable_libtorch"
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    from vllm.platforms.interface import DeviceCapability

    from vllm_sepllm.engine.gpu.platform import SepLLMCudaPlatform

    capability = classmethod(lambda cls, *args: DeviceCapability(9, 0))
    monkeypatch.setattr(SepLLMCudaPlatform, "get_device_capability", capability)
    return SepLLMCudaPlatform


def configuration(backend="sepllm", **changes):
    """As it comes to the platform: made on a CPU, and what that platform added taken back."""
    from vllm.engine.arg_utils import EngineArgs

    sepllm = {"additional_config": {"sepllm": {"window_size": 64}}} if backend else {}
    options = {"model": MODEL, "max_model_len": 512, "dtype": "bfloat16"}
    config = EngineArgs(**options, attention_backend=backend, **sepllm).create_engine_config()
    config.parallel_config.worker_cls = "auto"
    config.scheduler_config.scheduler_cls = None
    for name, value in changes.items():
        section, _, field = name.rpartition("__")
        setattr(getattr(config, section) if section else config, field, value)
    return config


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "fp8", "fp8_e4m3"])
@pytest.mark.parametrize("is_async", [False, True])
def test_a_configuration_is_completed(platform, dtype, is_async):
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.worker.gpu_worker import Worker

    config = configuration(
        cache_config__cache_dtype=dtype, scheduler_config__async_scheduling=is_async
    )
    platform.check_and_update_config(config)
    worker = resolve_obj_by_qualname(config.parallel_config.worker_cls)
    assert issubclass(worker, Worker)
    assert worker.__name__ == "SepLLMGPUWorker"
    scheduler = "SepLLMAsyncScheduler" if is_async else "SepLLMScheduler"
    assert config.scheduler_config.scheduler_cls.endswith(f".{scheduler}")


def test_refusals(platform):
    from vllm.config.weight_transfer import WeightTransferConfig

    from vllm_sepllm.config import ConfigError

    for changes, message in (
        ({"cache_config__cache_dtype": "fp8_e5m2"}, "kv_cache_dtype='fp8_e5m2' is not supported"),
        ({"parallel_config__enable_dbo": True}, "enable_dbo=True splits batches"),
        ({"parallel_config__ubatch_size": 2}, "ubatch_size=2 splits batches"),
        (
            {"cache_config__block_size": 48, "cache_config__user_specified_block_size": True},
            "block_size=48: must be a power of two on CUDA, e.g. 32",
        ),
        (
            {"cache_config__cache_dtype": "fp8", "weight_transfer_config": WeightTransferConfig()},
            "weight_transfer_config with kv_cache_dtype='fp8': a captured graph keeps the scales",
        ),
        ({"parallel_config__worker_cls": "mine.Worker"}, "worker_cls='mine.Worker'"),
    ):
        with pytest.raises(ConfigError, match=message):
            platform.check_and_update_config(configuration(**changes))


def test_xformers_is_named_if_it_is_missing(platform, monkeypatch):
    from vllm_sepllm.config import ConfigError
    from vllm_sepllm.engine.startup import checks

    chosen = {"window_size": 64, "prefill_kernel": "xformers"}
    changes = {"additional_config": {"sepllm": chosen}}

    def complete():
        config = configuration()
        config.additional_config = changes["additional_config"]
        platform.check_and_update_config(config)

    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"pip install 'vllm-sepllm\[xformers\]', or leave it out"
    ):
        complete()
    monkeypatch.setattr(checks, "find_spec", lambda name: name)
    complete()


def test_another_backend_is_left_alone(platform):
    config = configuration(backend=None)
    platform.check_and_update_config(config)
    assert config.parallel_config.worker_cls == "vllm.v1.worker.gpu_worker.Worker"
    assert config.scheduler_config.scheduler_cls is None


def test_backends_of_layers(platform, monkeypatch):
    """Ours for full attention, vLLM's choice for sliding windows."""
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

    from vllm_sepllm.engine.registration import BACKEND_PATH, register

    register()
    sepllm = AttentionBackendEnum["SEPLLM"]
    full = AttentionSelectorConfig(64, torch.bfloat16, "fp8", 16)
    assert platform.get_attn_backend_cls(sepllm, full) == BACKEND_PATH
    sliding = full._replace(has_sliding_window=True, kv_cache_dtype="auto")
    assert "sepllm" not in platform.get_attn_backend_cls(sepllm, sliding)
    for changed in ({"use_mla": True}, {"has_sink": True}, {"head_size": 72}, {"block_size": 24}):
        with pytest.raises(ValueError, match="not valid"):
            platform.get_attn_backend_cls(sepllm, full._replace(**changed))
    for older, dtype in (((7, 5), "auto"), ((8, 0), "fp8")):
        capability = classmethod(lambda cls, *args, found=older: DeviceCapability(*found))
        monkeypatch.setattr(platform, "get_device_capability", capability)
        said = f"needs compute capability 8.0, with FP8 pages 8.9, and this GPU has {older[0]}"
        with pytest.raises(ValueError, match=said):
            platform.get_attn_backend_cls(sepllm, full._replace(kv_cache_dtype=dtype))


@pytest.mark.parametrize(
    ("cpu", "cuda", "expected"),
    [
        ("cpu.CpuPlatform", None, "cpu.platform.SepLLMCpuPlatform"),
        ("zen_cpu.ZenCpuPlatform", None, "cpu.zen_platform.SepLLMZenPlatform"),
        (None, "cuda.CudaPlatform", "gpu.platform.SepLLMCudaPlatform"),
        (None, None, None),
    ],
)
def test_the_platform_of_a_build(monkeypatch, cpu, cuda, expected):
    """It is below the one that vLLM would take, and has what that one has."""
    from vllm_sepllm.engine import registration

    for kind, own in (("cpu", cpu), ("cuda", cuda)):
        path = own and f"vllm.platforms.{own}"
        monkeypatch.setattr(f"vllm.platforms.{kind}_platform_plugin", lambda path=path: path)
    found = registration.platform()
    assert found == (expected and f"vllm_sepllm.engine.{expected}")
    if cpu:
        ours, own = (resolve_obj_by_qualname(p) for p in (found, f"vllm.platforms.{cpu}"))
        assert issubclass(ours, own)
        assert ours().is_zen_cpu() == own().is_zen_cpu()
        assert ours.supported_dtypes is own.supported_dtypes
