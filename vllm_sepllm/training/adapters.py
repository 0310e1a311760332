"""Adapters of PEFT carry the rule in a file beside their weights.

A model carries it in its ``config.json``, but an adapter's configuration has no place for it. So
``save_pretrained`` is wrapped once, when a rule is first applied: PEFT's own, and that of
transformers for models whose adapter came with ``add_adapter``. Trainer, TRL and plain loops all
save through one of them, and some make the PEFT model themselves. For models to which no rule was
applied both do what they did.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from vllm_sepllm.carried import RULE_KEY, config_of, write_rule
from vllm_sepllm.config import SepLLMConfig

_WRAPPED = "_writes_the_rule_of_sepllm"
_APPLIED = "_sepllm_was_applied"


def has_adapter(model: Any) -> bool:
    """Whether a model of transformers has layers of PEFT inside."""
    if getattr(model, "_hf_peft_config_loaded", False):
        return True
    if find_spec("peft") is None:
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def save_rules_with_adapters(model: Any) -> None:
    """Have adapters of a model to which a rule was applied saved with it. Does nothing without
    PEFT, or twice."""
    setattr(model, _APPLIED, True)
    if find_spec("peft") is None:
        return
    from peft import PeftModel

    _wrap(PeftModel, _folders_of_peft)
    _wrap(PreTrainedModel, _folder_of_transformers)


def _folders_of_peft(model: Any, named: dict[str, Any]) -> list[str]:
    """Below the folder that is saved to: all adapters but the default one have their own. The rule
    is that of those which are trained with it."""
    saved = named.get("selected_adapters") or model.peft_config
    active = [name for name in saved if name in model.active_adapters]
    others = [name for name in saved if name not in active]
    if others:
        warnings.warn(
            f"SepLLM: the rule is saved with the active adapters ({', '.join(active)}), not with "
            f"{', '.join(others)}: copy the sepllm.json of those that were trained under a rule",
            stacklevel=3,
        )
    return ["" if name == "default" else name for name in active]


def _folder_of_transformers(model: Any, named: dict[str, Any]) -> list[str]:
    """Of a model with an adapter the active one is saved, and nothing else."""
    del named
    return [""] if getattr(model, "_hf_peft_config_loaded", False) else []


def _wrap(kind: Any, folders: Callable[[Any, dict[str, Any]], list[str]]) -> None:
    saved = kind.save_pretrained
    if getattr(saved, _WRAPPED, False):
        return

    signature = inspect.signature(saved)

    @functools.wraps(saved)
    def save_pretrained(self: Any, save_directory: str, *args: Any, **kwargs: Any) -> Any:
        named = signature.bind(self, save_directory, *args, **kwargs).arguments
        model = self if kind is PreTrainedModel else self.get_base_model()
        rule = getattr(getattr(model, "config", None), RULE_KEY, None)
        is_ours = rule is not None and getattr(model, _APPLIED, False)
        if not is_ours or not named.get("is_main_process", True):
            return saved(self, save_directory, *args, **kwargs)
        config = config_of(rule, "the model's config")
        written = [Path(save_directory) / folder for folder in folders(self, named)]
        with _written_before_upload(self, written, config):
            result = saved(self, save_directory, *args, **kwargs)
        _write(written, config)
        return result

    setattr(save_pretrained, _WRAPPED, True)
    kind.save_pretrained = save_pretrained


@contextmanager
def _written_before_upload(model: Any, folders: list[Path], config: SepLLMConfig) -> Iterator[None]:
    """Models of transformers upload what they have saved (``push_to_hub``): the rule too."""
    upload = getattr(model, "_upload_modified_files", None)
    if upload is None:
        yield
        return

    def write_and_upload(*args: Any, **kwargs: Any) -> Any:
        _write(folders, config)
        return upload(*args, **kwargs)

    model._upload_modified_files = write_and_upload
    try:
        yield
    finally:
        del model._upload_modified_files


def _write(folders: list[Path], config: SepLLMConfig) -> None:
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        write_rule(folder, config)
