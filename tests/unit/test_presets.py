"""Presets are what was published, and the documentation says the same."""

import re

import pytest
from helpers import ROOT

from vllm_sepllm.config import ConfigError, SepLLMConfig
from vllm_sepllm.kept_ids import resolve_kept
from vllm_sepllm.option_names import OTHER_NAMES
from vllm_sepllm.presets import PRESETS

pytestmark = pytest.mark.unit
OPTIONS = (ROOT / "docs/options.md").read_text(encoding="utf-8")

# Ids in SepLLM's repository (kv_cache_manager.py, sepllm_attention.py), which do not depend on us.
NEOX = [15, 13, 32, 2, 28, 27, 209, 186, 187]
NEOX_STREAMING = [*NEOX, 964, 1157, 3736, 2195, 3706, 1163, 2490, 50276, 586, 4928, 50275]
# Two and three spaces have a second id each, which the tokenizer does not write.
SAME_TEXTS = [245, 341]
# And their texts in the tokenizers of Llama-3 and Falcon, which are not here.
LLAMA3 = {13: ".", 11: ",", 30: "?", 0: "!", 26: ";", 25: ":", 198: "\n", 220: " "}
LLAMA3_STREAMING = LLAMA3 | {
    **{662: " .", 1174: " ,", 949: " ?", 758: " !", 2652: " ;", 551: " :"},
    **{720: " \n", 256: "  ", 262: "   "},
}
FALCON = {
    **{25: ".", 23: ",", 42: "?", 12: "!", 38: ";", 37: ":", 193: "\n"},
    **{4610: " \n", 204: " ", 258: "  ", 1212: "\n ", 23787: " \n ", 466: "   "},
}


@pytest.mark.parametrize(
    ("name", "ids"), [("pythia", NEOX), ("neox-streaming", [*NEOX_STREAMING, *SAME_TEXTS])]
)
def test_ids_in_the_20b_tokenizer(pythia, name, ids):
    config = SepLLMConfig.from_dict({"preset": name})
    assert resolve_kept(config, pythia).token_ids == tuple(sorted(ids))


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("llama3", LLAMA3),
        ("llama3-streaming", LLAMA3_STREAMING),
        ("falcon-streaming", FALCON),
    ],
)
def test_texts(name, texts):
    separators = SepLLMConfig.from_dict({"preset": name}).separators
    assert sorted(separators) == sorted(texts.values())


@pytest.mark.parametrize(
    ("name", "cache_size"),
    [("llama3-streaming", 800), ("neox-streaming", 1280), ("falcon-streaming", 1024)],
)
def test_streaming_presets_fill_the_published_cache(name, cache_size):
    config = SepLLMConfig.from_dict({"preset": name})
    held = config.num_sink_tokens, config.max_separator_tokens, config.window_size
    assert sum(held) == cache_size
    assert config.position_mode == "cache"


def test_options_beside_a_preset_come_first():
    config = SepLLMConfig.from_dict({"window_size": 512, "preset": "llama3"})
    assert (config.num_sink_tokens, config.window_size) == (3, 512)
    assert "preset" not in config.to_dict()
    assert SepLLMConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("name", ["llama4", ["llama3"], None, {"llama3": 1}])
def test_unknown_presets_are_refused(name):
    with pytest.raises(ConfigError, match=r"preset=.*: must be one of 'llama3', "):
        SepLLMConfig.from_dict({"preset": name})


def rows(heading):
    """Cells of the table below a heading of docs/options.md."""
    section = OPTIONS.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_of_presets():
    found = {row[0].strip("`"): row for row in rows("Presets")}
    assert list(found) == list(PRESETS)
    for name, (_, source, sinks, window, bound, _, positions) in found.items():
        config = SepLLMConfig.from_dict({"preset": name})
        assert source == PRESETS[name].source
        assert (int(sinks), int(window)) == (config.num_sink_tokens, config.window_size)
        assert bound == (
            str(config.max_separator_tokens or "none") if config.method.uses_keep else ""
        )
        assert positions == f"`{config.position_mode}`"


def test_the_table_of_names_is_what_start_up_knows():
    named = [
        name for row in rows("Names of other projects") for name in re.findall("`(.*?)`", row[0])
    ]
    assert sorted(named) == sorted(OTHER_NAMES)
