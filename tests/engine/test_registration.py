"""Names, pickling, and that nothing changes while another backend is selected."""

import copy
import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers import MODEL

pytestmark = pytest.mark.engine


def configuration(**options):
    from vllm.engine.arg_utils import EngineArgs

    defaults = {"model": MODEL, "max_model_len": 512, "dtype": "float32"}
    return EngineArgs(**{**defaults, **options}).create_engine_config()


@pytest.mark.parametrize("name", ["sepllm", "SEPLLM", "SepLLM"])
def test_every_spelling_selects_the_backend(name):
    config = configuration(attention_backend=name)
    assert config.attention_config.backend.name == "SEPLLM"


def test_register_can_be_called_again():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_sepllm.engine.registration import register

    register()
    member = AttentionBackendEnum["SEPLLM"]
    register()
    assert AttentionBackendEnum["SEPLLM"] is member
    assert member.get_class().get_name() == "SEPLLM"


def test_a_fresh_process_unpickles_the_backend_before_plugins_load():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_sepllm.engine.registration import register

    register()
    data = pickle.dumps([AttentionBackendEnum["SEPLLM"], AttentionBackendEnum["CPU_ATTN"]])
    code = (
        "import pickle, sys\n"
        "first, second = pickle.loads(bytes.fromhex(sys.argv[1]))\n"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum as E\n"
        "assert first is E['SEPLLM'] and second is E['CPU_ATTN']\n"
        "print('same members')\n"
    )
    command = [sys.executable, "-c", code, data.hex()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "same members" in result.stdout, result.stderr
    assert copy.deepcopy(AttentionBackendEnum["SEPLLM"]) is AttentionBackendEnum["SEPLLM"]


@pytest.mark.parametrize("backend", [None, "CPU_ATTN"])
def test_nothing_changes_with_another_backend(backend):
    """The configuration is the one vLLM's own platform makes."""
    from vllm import platforms
    from vllm.platforms.cpu import CpuPlatform

    mine = configuration(attention_backend=backend, additional_config={"sepllm": {"x": "y"}})
    ours = platforms.current_platform
    platforms.current_platform = CpuPlatform()
    try:
        stock = configuration(attention_backend=backend, additional_config={"sepllm": {"x": "y"}})
    finally:
        platforms.current_platform = ours
    assert mine.cache_config == stock.cache_config
    assert mine.parallel_config.worker_cls == stock.parallel_config.worker_cls
    assert mine.scheduler_config.scheduler_cls is None
    assert mine.additional_config == {"sepllm": {"x": "y"}}
    assert mine.cache_config.enable_prefix_caching


@pytest.mark.parametrize(
    "options",
    [
        {"distributed_executor_backend": "ray", "tensor_parallel_size": 2},
        {"data_parallel_backend": "ray", "data_parallel_size": 2},
    ],
)
def test_ray_stays_refused_with_another_backend(options):
    """In the words of vLLM's own CPU platform; its executor would say them later."""
    from vllm.platforms import current_platform
    from vllm.platforms.cpu import CpuPlatform

    assert not CpuPlatform.ray_device_key, "vLLM serves Ray on CPU now: drop our refusal"
    assert current_platform.ray_device_key == "GPU"
    with pytest.raises(ValueError, match="current platform cpu does not support ray"):
        configuration(**options)


def test_ray_executor_is_accepted():
    ray = {"distributed_executor_backend": "ray", "tensor_parallel_size": 2}
    config = configuration(attention_backend="sepllm", **ray)
    assert config.parallel_config.use_ray


def test_sliding_window_layers_keep_vllms_backend():
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

    from vllm_sepllm.engine.cpu.platform import CPU_BACKEND_PATH
    from vllm_sepllm.engine.registration import register

    register()
    import torch

    sepllm = AttentionBackendEnum["SEPLLM"]
    full = AttentionSelectorConfig(64, torch.bfloat16, "auto", 32)
    assert current_platform.get_attn_backend_cls(sepllm, full) == CPU_BACKEND_PATH
    sliding = full._replace(has_sliding_window=True)
    stock = AttentionBackendEnum.CPU_ATTN.get_path()
    assert current_platform.get_attn_backend_cls(sepllm, sliding) == stock
    assert current_platform.get_attn_backend_cls(None, full) == stock
    for changed in ({"use_mla": True}, {"has_sink": True}, {"attn_type": "encoder_only"}):
        with pytest.raises((ValueError, NotImplementedError), match="not supported"):
            current_platform.get_attn_backend_cls(sepllm, full._replace(**changed))


def test_importing_the_package_imports_neither_torch_nor_vllm():
    code = (
        "import sys, vllm_sepllm, vllm_sepllm.cli.main, vllm_sepllm.engine.registration\n"
        "assert not {'torch', 'vllm', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_compatibility_table():
    from vllm_sepllm.engine import compat

    assert compat.evidence("0.32.0") == compat.evidence("0.32.0+cpu") == "run"
    assert compat.evidence("0.33.0+cpu") == "source checked"
    for other in ("0.31.9", "0.32.1", "0.33.0rc1", "0.33.0.dev7+g123", "0.34.0", "main"):
        assert compat.evidence(other) == "untested"
    assert compat.summary() == "run: 0.32.0; source checked: 0.33.0"
    assert compat.caution("0.32.0+cpu") is None
    checked, other = compat.caution("0.33.0"), compat.caution("0.34.0")
    assert checked.startswith("source checked against vLLM 0.33.0, not run with it: no CPU build")
    assert other.startswith("untested with vLLM 0.34.0, which may have moved what it uses")
    for text in (checked, other):
        assert text.endswith("(run: 0.32.0; source checked: 0.33.0)")


@pytest.mark.parametrize(
    ("found", "row"),
    [
        ("0.32.0+cpu", ("vLLM", "0.32.0+cpu (run)", True)),
        ("0.33.0+cpu", ("vLLM", "0.33.0+cpu (source checked)", False)),
        ("0.99.0+cpu", ("vLLM", "0.99.0+cpu (untested)", False)),
    ],
)
def test_the_doctor_shows_the_compatibility_table(monkeypatch, found, row):
    from vllm_sepllm.engine import doctor

    monkeypatch.setattr(doctor, "vllm_version", lambda: found)
    diagnosis = doctor.Diagnosis()
    doctor._versions(diagnosis)
    assert row in diagnosis.rows
    assert ("vLLM releases", "run: 0.32.0; source checked: 0.33.0", True) in diagnosis.rows
    assert diagnosis.problems == []


@pytest.mark.parametrize(("given", "expected"), [(None, 32), (64, 64)])
@pytest.mark.parametrize("sets_default_late", [False, True], ids=["as in 0.32", "as in 0.33"])
def test_default_block_size(monkeypatch, given, expected, sets_default_late):
    """vLLM 0.33 sets its own default once the model is loaded."""
    from vllm.platforms import current_platform
    from vllm.platforms.cpu import CpuPlatform

    def stock(cls, vllm_config):
        cache = vllm_config.cache_config
        if sets_default_late and not cache.user_specified_block_size:
            cache.block_size = 128

    monkeypatch.setattr(CpuPlatform, "update_block_size_for_backend", classmethod(stock))
    sizes = {} if given is None else {"block_size": given}
    config = configuration(attention_backend="sepllm", **sizes)
    current_platform.update_block_size_for_backend(config)
    assert config.cache_config.block_size == expected
    config = configuration()
    current_platform.update_block_size_for_backend(config)
    stock_size = 128 if sets_default_late else config.cache_config.block_size
    assert config.cache_config.block_size == stock_size


def test_an_untested_version_is_warned_of_once(monkeypatch):
    from vllm_sepllm.engine.startup import prepare as startup

    said = []
    spy = SimpleNamespace(
        info_once=lambda *a: said.append(("info", a[0] % a[1:])),
        warning_once=lambda *a: said.append(("warning", a[0] % a[1:])),
        warning=lambda *a: said.append(("warning", a[0])),
    )
    monkeypatch.setattr(startup, "logger", spy)
    monkeypatch.setattr(startup, "vllm_version", lambda: "0.99.0+cpu")
    configuration(attention_backend="sepllm", additional_config={"sepllm": {"window_size": 64}})
    info = [text for kind, text in said if kind == "info"]
    assert len(info) == 1
    for part in ("policy=sepllm", "4 sinks", "64 tokens", "9 separator ids", "vLLM 0.99.0+cpu"):
        assert part in info[0]
    warnings = [text for kind, text in said if kind == "warning"]
    assert len(warnings) == 1
    assert "0.99.0" in warnings[0]
    assert "0.32.0" in warnings[0]


def test_a_platform_that_would_leave_it_out_is_refused():
    """``VLLM_TARGET_DEVICE=cpu``: vLLM asks no plugin, and its own platform has full attention."""
    code = (
        "from vllm.engine.arg_utils import EngineArgs\n"
        "from vllm_sepllm.engine.doctor import diagnose\n"
        f"print(diagnose({MODEL!r}, {{}}).problems)\n"
        f"EngineArgs({MODEL!r}).create_engine_config()\n"
        "print('others are served')\n"
        f"EngineArgs({MODEL!r}, attention_backend='sepllm').create_engine_config()\n"
    )
    env = {**os.environ, "VLLM_TARGET_DEVICE": "cpu", "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    *_, problems, others = done.stdout.splitlines()
    assert "as it does with VLLM_TARGET_DEVICE=cpu: unset that variable" in problems
    assert others == "others are served"
    assert done.returncode == 1
    assert "SepLLM attention: vLLM took CpuPlatform for its platform" in done.stderr
