"""How much of a text is attended to."""

import numpy as np
import pytest
from helpers import find_separators, usual_spans

from vllm_sepllm.config import SepLLMConfig
from vllm_sepllm.evaluation.share import num_attended, window_of_equal_share
from vllm_sepllm.oracle.dense_mask import sepllm_mask

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("length", [1, 3, 40, 900])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window_size": 1, "num_sink_tokens": 0},
        {"window_size": 64, "max_separator_tokens": 3},
        {"window_size": 16, "max_separator_tokens": 1000, "num_sink_tokens": 20},
        {"policy": "streaming", "window_size": 64},
        {"policy": "fixed_interval", "interval": 5, "window_size": 64},
    ],
)
def test_tokens_attended_to_are_those_of_the_mask(book, tokenizer, options, length):
    config = SepLLMConfig.from_dict(options)
    ids = find_separators() if config.uses_separators else ()
    mask = sepllm_mask(
        book[:length],
        ids,
        config.num_sink_tokens,
        config.window_size,
        max_separators=config.max_separator_tokens,
        interval=config.interval,
    )
    assert num_attended(config, tokenizer, book[:length]) == int(np.asarray(mask)[-1].sum())


@pytest.mark.parametrize("length", [3, 900])
def test_tokens_attended_to_with_spans(book, tokenizer, length):
    options, after = usual_spans()
    config = SepLLMConfig.from_dict({**options, "window_size": 64})
    mask = sepllm_mask(book[:length], config.keep, 4, 64, after=after)
    assert num_attended(config, tokenizer, book[:length]) == int(np.asarray(mask)[-1].sum())


@pytest.mark.parametrize("bound", [None, 10])
def test_windows_of_equal_share(book, tokenizer, bound):
    config = SepLLMConfig(window_size=64, max_separator_tokens=bound, position_mode="cache")
    other = window_of_equal_share(config, tokenizer, book[:900])
    assert (other.policy, other.position_mode) == ("streaming", "cache")
    attended = num_attended(config, tokenizer, book[:900])
    assert num_attended(other, tokenizer, book[:900]) == attended < 900
