"""Adapters of PEFT carry the rule in a file beside their weights.

A model carries it in its ``config.json``, but an adapter's configuration has no place for it. So
``PeftModel.save_pretrained`` is wrapped, once, when a rule is first applied: Trainer, TRL and plain
loops all save through it, and some make the PEFT model themselves. For models without a rule it
does what it did.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_sepllm.carried import RULE_KEY, config_of, write_rule

_WRAPPED = "_writes_the_rule_of_sepllm"


def save_rules_with_adapters() -> None:
    """Have adapters of models with a rule saved with it. Does nothing without PEFT, or twice."""
    if find_spec("peft") is None:
        return
    from peft import PeftModel

    saved = PeftModel.save_pretrained
    if getattr(saved, _WRAPPED, False):
        return

    @functools.wraps(saved)
    def save_pretrained(self: Any, save_directory: str, *args: Any, **kwargs: Any) -> Any:
        result = saved(self, save_directory, *args, **kwargs)
        rule = getattr(getattr(self.get_base_model(), "config", None), RULE_KEY, None)
        if rule is not None and kwargs.get("is_main_process", True):
            config = config_of(rule, "the model's config")
            for name in kwargs.get("selected_adapters") or self.peft_config:
                # As PEFT does: all adapters but the default one have folders of their own.
                folder = Path(save_directory) / ("" if name == "default" else name)
                write_rule(folder, config)
        return result

    setattr(save_pretrained, _WRAPPED, True)
    PeftModel.save_pretrained = save_pretrained
