"""Adapters that were trained under another rule than the one served are warned of."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path
from vllm.lora.worker_manager import WorkerLoRAManager

from vllm_sepllm.carried import differences, read_rule
from vllm_sepllm.config import SepLLMConfig

logger = init_logger(f"vllm.{__name__}")


def check_adapters(manager: WorkerLoRAManager, served: SepLLMConfig, num_layers: int) -> None:
    """Have a worker's manager of adapters look for the rule beside each one's weights.

    An adapter is loaded in the middle of a step, for the requests of it, so nothing is refused
    here: the engine would end.

    Args:
        manager: vLLM's, changed.
        served: the options, before texts in them became ids.
        num_layers: of the model.
    """
    load = manager._load_adapter

    def load_adapter(lora_request: LoRARequest) -> Any:
        loaded = load(lora_request)
        sentence = warning_of(lora_request.lora_name, lora_request.lora_path, served, num_layers)
        if sentence is not None:
            logger.warning_once("SepLLM attention: %s.", sentence)
        return loaded

    manager._load_adapter = load_adapter


def warning_of(name: str, path: str, served: SepLLMConfig, num_layers: int) -> str | None:
    """What is wrong with serving an adapter under these options, in one sentence without its full
    stop; ``None`` where nothing is known to be."""
    try:
        rule = read_rule(get_adapter_absolute_path(path))
    except Exception as error:  # whatever is wrong with a file, the step goes on
        return f"adapter {name!r}: {str(error).rstrip('.')}"
    found = [] if rule is None else differences(served, rule, num_layers)
    if not found:
        return None
    return (
        f"adapter {name!r} was trained under another rule: {'; '.join(found)}; serve it with the "
        "options that it was trained under, or expect worse answers"
    )
