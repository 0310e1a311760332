"""What options of other projects are called here.

The names are those of SepLLM's own code and of its ``SepCache`` (arXiv 2412.12094), of
StreamingLLM (arXiv 2309.17453) and the package ``attention_sinks``, of ``SinkCache`` in Hugging
Face transformers, of H2O (arXiv 2306.14048), SnapKV (arXiv 2404.14469) and kvpress.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

_SINKS = "use num_sink_tokens"
_WINDOW = "use window_size, which counts the query's own token too"
_BOUND = "use max_separator_tokens"
_IDS = "use separator_token_ids"
_TEXTS = "use separators"
_NO_BUDGET = (
    "there is no size of the whole cache: it is num_sink_tokens + max_separator_tokens + "
    "window_size; set these"
)
_NO_RATIO = (
    "SepLLM has no budget ratio, the share that is kept follows from the separators of a text: "
    "choose separators and window_size, and bound them with max_separator_tokens"
)
_NO_SCORES = (
    "SepLLM looks at what tokens are, not attention scores, so there is nothing like it: choose "
    "separators"
)
OTHER_NAMES = {
    **dict.fromkeys(
        (
            "start_size",
            "init_cache_size",
            "initial_tokens",
            "num_initial_tokens",
            "n_sink",
            "n_sinks",
            "num_sinks",
            "sink_size",
            "sink_tokens",
            "attention_sink_size",
        ),
        _SINKS,
    ),
    **dict.fromkeys(
        (
            "recent_size",
            "local_size",
            "n_local",
            "local_window_size",
            "recent_window",
            "sliding_window",
            "attention_sink_window_size",
        ),
        _WINDOW,
    ),
    "window_length": "use window_size, which does not count the sinks as SinkCache's name does",
    **dict.fromkeys(("sep_cache_size", "sep_size", "max_separators"), _BOUND),
    **dict.fromkeys(("cache_size", "max_capacity_prompt", "max_cache_size"), _NO_BUDGET),
    **dict.fromkeys(
        ("separator_ids", "sep_token_ids", "sep_ids", "separators_ids", "sep_tokens_ids"), _IDS
    ),
    **dict.fromkeys(("separator_tokens", "sep_tokens", "separator", "separator_texts"), _TEXTS),
    **dict.fromkeys(
        ("compression_ratio", "keep_ratio", "kv_ratio", "sparsity", "budget_ratio"), _NO_RATIO
    ),
    **dict.fromkeys(
        (
            "heavy_hitter",
            "heavy_hitter_size",
            "heavy_ratio",
            "hh_size",
            "hh_ratio",
            "recent_ratio",
            "kernel_size",
        ),
        _NO_SCORES,
    ),
    "enable_pos_shift": "use position_mode='cache'",
    "use_max_sep_cache": "max_separator_tokens bounds separators, null keeps all",
    "sep_accumulation": "separators always accumulate; max_separator_tokens bounds them",
    "enable_streaming": "use policy='streaming'",
    "enable_streamingllm": "use policy='streaming'",
    "enable_sepllm": "SepLLM is on with --attention-backend sepllm; leave it out",
    **dict.fromkeys(
        ("padding_id", "sep_padding_in_batch"),
        "nothing is padded in vLLM; leave it out",
    ),
}


def hint(key: object, known: Sequence[str]) -> str:
    """What to write instead of an unknown option."""
    name = str(key).strip().lower().replace("-", "_")
    if name in known:
        return f"did you mean {name!r}?"
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
