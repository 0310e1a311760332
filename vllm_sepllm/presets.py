"""Settings by name, most of them of papers: ``{"preset": "llama3", "window_size": 512}``.

A preset is nothing but options; those given beside it come first. Separators are texts here, which
are looked up in the model's own tokenizer. In the tokenizer that a preset was published for, they
are the ids that its authors list, and ids of the same texts that this tokenizer never writes.

Sources: SepLLM (arXiv 2412.12094) and its repository HKUDS/SepLLM, whose streaming cache varies
between ``local_size`` and ``cache_size - init_cache_size - sep_cache_size`` recent tokens; a window
here has always the larger number, so that all together are ``cache_size``. StreamingLLM
(arXiv 2309.17453). FixLLM is a baseline of the SepLLM paper. "facts" is this project's own
(``docs/facts.md``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm_sepllm.separator_lists import DEFAULT_SEPARATORS

# The paper's marks, and their forms with a space before or behind them that are single tokens.
_WITHOUT_TAB = tuple(text for text in DEFAULT_SEPARATORS if text != "\t")
_SPACED = (" .", " ,", " ?", " !", " ;", " :", " \n", "  ")
_NEOX = (*DEFAULT_SEPARATORS, *_SPACED, "\n ", " \n ", "   ")
_FALCON = (*_WITHOUT_TAB, " \n", "  ", "\n ", " \n ", "   ")


@dataclass(frozen=True)
class Preset:
    """Options by one name.

    Attributes:
        source: what they were published for, or are good for.
        options: as in ``additional_config["sepllm"]``.
    """

    source: str
    options: dict[str, Any] = field(hash=False)


def _streaming(cache_size: int, separators: tuple[str, ...]) -> dict[str, Any]:
    """SepLLM's streaming cache of ``cache_size`` tokens, 4 sinks and 64 separators among them."""
    return {
        "num_sink_tokens": 4,
        "max_separator_tokens": 64,
        "window_size": cache_size - 4 - 64,
        "position_mode": "cache",
        "separators": separators,
    }


PRESETS = {
    "llama3": Preset(
        "SepLLM without training, Llama-3-8B",
        {"num_sink_tokens": 3, "window_size": 256, "separators": _WITHOUT_TAB},
    ),
    "llama3-streaming": Preset(
        "SepLLM streaming, Llama-3-8B, cache of 800",
        _streaming(800, (*_WITHOUT_TAB, *_SPACED, "   ")),
    ),
    "pythia": Preset(
        "SepLLM trained from scratch, Pythia-160M",
        {"num_sink_tokens": 3, "window_size": 128, "separators": DEFAULT_SEPARATORS},
    ),
    "neox-streaming": Preset(
        "SepLLM streaming, GPT-NeoX-20B, cache of 1280", _streaming(1280, _NEOX)
    ),
    "falcon-streaming": Preset(
        "SepLLM streaming, Falcon-40B, cache of 1024", _streaming(1024, _FALCON)
    ),
    "streamingllm": Preset(
        "StreamingLLM",
        {
            "policy": "streaming",
            "num_sink_tokens": 4,
            "window_size": 1020,
            "position_mode": "cache",
        },
    ),
    "facts": Preset(
        "this project: names, numbers and what is said of them",
        {
            "keep": ["special", "digits", "names", "capitalized"],
            "keep_after": {"names": 6, "digits": 2, "capitalized": 1},
        },
    ),
    "fixllm": Preset(
        "FixLLM (one token of five), Llama-3-8B",
        {"policy": "fixed_interval", "interval": 5, "num_sink_tokens": 3, "window_size": 256},
    ),
}
