"""Entry points that vLLM calls. Importing this module imports no vLLM.

vLLM loads general plugins in every process, before it parses arguments; platform plugins when
it first asks which platform it runs on, in the middle of its own imports.
"""

from __future__ import annotations

import copyreg
from typing import Any

from vllm_sepllm.engine.names import (
    BACKEND_NAME,
    BACKEND_PATH,
    CPU_PLATFORM_PATH,
    CUDA_PLATFORM_PATH,
    ZEN_PLATFORM_PATH,
)


def platform() -> str | None:
    """``vllm.platform_plugins``: a class below vLLM's own for CPUs and CUDA, nothing elsewhere.

    It is where a plugin sees a whole configuration. vLLM's own CPU platform also answers CPU_ATTN
    whatever backend was asked for.
    """
    from vllm.platforms import cpu_platform_plugin, cuda_platform_plugin

    own = cpu_platform_plugin()
    if own is not None:
        return ZEN_PLATFORM_PATH if own.endswith(".ZenCpuPlatform") else CPU_PLATFORM_PATH
    return CUDA_PLATFORM_PATH if cuda_platform_plugin() is not None else None


def register() -> None:
    """``vllm.general_plugins``: make ``--attention-backend sepllm`` known. Idempotent.

    It is called before arguments become a configuration, and in every process.
    """
    from vllm_sepllm.engine.patches import look_at_arguments

    _register_backend()
    look_at_arguments()


def _register_backend() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if BACKEND_NAME in AttentionBackendEnum.__members__:
        return
    register_backend(BACKEND_NAME, BACKEND_PATH)
    # A member added at run time is pickled by value, and a spawned process unpickles its
    # configuration before it loads plugins. Pickled by name through our loader, it registers
    # itself first. Not needed once vLLM pickles backends by name.
    copyreg.pickle(AttentionBackendEnum, _reduce_backend)


def _reduce_backend(member: Any) -> tuple[Any, tuple[str]]:
    return _load_backend, (member.name,)


def _load_backend(name: str) -> Any:
    """A member of the enumeration, in a process that was given its configuration."""
    from vllm_sepllm.engine.patches import show_metrics

    _register_backend()
    show_metrics()  # it may be one that serves requests, as with Ray Serve
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return AttentionBackendEnum[name]
