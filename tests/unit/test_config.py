import json
from dataclasses import fields

import pytest

from vllm_sepllm.config import DEFAULT_SEPARATORS, MAX_TOKENS, ConfigError, SepLLMConfig
from vllm_sepllm.layers import Layer, LayerPlan
from vllm_sepllm.option_names import OTHER_NAMES

pytestmark = pytest.mark.unit


def test_defaults_are_the_papers():
    config = SepLLMConfig()
    assert (config.policy, config.num_sink_tokens, config.window_size) == ("sepllm", 4, 256)
    assert set(config.separators) == set(".,?!;: \t\n")
    assert config.separator_match == "exact"
    assert config.max_separator_tokens is None
    assert config.position_mode == "original"


MANY = [f"text {number}" for number in range(1001)]


@pytest.mark.parametrize("nothing", [None, {}])
def test_from_dict_of_nothing_is_the_default(nothing):
    assert SepLLMConfig.from_dict(nothing) == SepLLMConfig()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window_size": 1, "num_sink_tokens": 0},
        {"separators": ["。", "\n\n"], "separator_match": "composed"},
        {"separator_token_ids": [13, 11]},
        {"separator_token_ids": []},
        {"policy": "fixed_interval", "interval": 5},
        {"policy": "streaming", "window_size": MAX_TOKENS},
        {"max_separator_tokens": 64, "position_mode": "cache"},
        {"dense_layers": [0, 1, -2, -1]},
        {"prefill_kernel": "xformers"},
        {"separators": ["default", "cjk", "—"]},
        {"keep": ["separators", "digits", "<|im_end|>", 17]},
        {"keep": []},
        {
            "keep": ["digits", 7],
            "keep_after": [[4, ["digits"]], [2, [7]]],
            "segment_ends": [".", 5],
        },
        {"planned_kept_share": 0.25},
        {"planned_kept_share": 1},
        {"planning_text": "texts/chat.txt"},
    ],
)
def test_round_trip_through_json(options):
    config = SepLLMConfig.from_dict(options)
    assert SepLLMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(SepLLMConfig.from_dict(options))
    for key, value in options.items():
        given = sorted(value) if key == "separator_token_ids" else value
        assert config.to_dict()[key] == given


def test_token_ids_are_sorted_and_unique():
    assert SepLLMConfig(separator_token_ids=(13, 2, 13)).separator_token_ids == (2, 13)


def test_ids_take_the_place_of_what_names_them():
    config = SepLLMConfig(window_size=7, keep=("separators", "digits"), separators=(".",))
    assert config.kept_ids is None
    resolved = config.with_kept_ids((3, 5))
    assert resolved == SepLLMConfig(window_size=7, keep=(3, 5))
    assert resolved.kept_ids == (3, 5)


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        ({}, None),
        ({"keep": ["special"]}, None),
        ({"keep": [7, "the"]}, None),
        ({"keep": ["separators", 7], "separator_token_ids": [9, 2]}, (2, 7, 9)),
        ({"separator_token_ids": [9, 2]}, (2, 9)),
        ({"keep": [7, 3, 7]}, (3, 7)),
        ({"keep": []}, ()),
        ({"policy": "streaming"}, ()),
    ],
)
def test_ids_that_need_no_tokenizer(options, ids):
    config = SepLLMConfig.from_dict(options)
    assert config.kept_ids == ids
    assert config.keeps_nothing == (ids == ())


@pytest.mark.parametrize(
    ("keep_after", "pairs"),
    [
        (0, ()),
        (4, ((4, ("digits", "the")),)),
        ({"the": 4}, ((4, ("the",)),)),
        ({"the": 2, "digits": 4}, ((4, ("digits",)), (2, ("the",)))),
        ({"the": 2, "digits": 2}, ((2, ("the", "digits")),)),
        ({"the": 0}, ()),
        ([[2, ["the"]], [4, ["digits"]], [0, ["the"]]], ((4, ("digits",)), (2, ("the",)))),
    ],
)
def test_ways_to_say_what_is_kept_behind(keep_after, pairs):
    config = SepLLMConfig.from_dict({"keep": ["digits", "the"], "keep_after": keep_after})
    assert config.keep_after == pairs
    assert SepLLMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_keep_beside_a_preset_takes_the_spans_of_what_it_holds():
    config = SepLLMConfig.from_dict({"preset": "facts", "keep": ["separators", "digits"]})
    assert config.keep_after == ((2, ("digits",)),)
    config = SepLLMConfig.from_dict({"preset": "facts", "keep": ["separators"]})
    assert config.keep_after == ()
    config = SepLLMConfig.from_dict({"preset": "facts", "keep_after": 1})
    assert config.keep_after == ((1, config.keep),)


def test_spans_of_nothing_are_none():
    config = SepLLMConfig(keep=("a", "b"), keep_after={"b": 4}).with_kept_ids(
        (3,), ((4, ()),), (2,)
    )
    assert config == SepLLMConfig(keep=(3,))


def test_spans_become_ids():
    config = SepLLMConfig(keep=("digits", 9), keep_after=4)
    assert config.needs_tokenizer
    with pytest.raises(ValueError, match="keep_after is not resolved"):
        _ = config.resolved_spans
    resolved = config.with_kept_ids((5, 9), ((4, (5, 9)),), (2,))
    assert resolved.resolved_spans == (((4, (5, 9)),), (2,))
    assert not resolved.needs_tokenizer
    assert not resolved.with_kept_ids((5,)).keep_after
    ids = SepLLMConfig(keep=(9,), keep_after=4)
    assert ids.needs_tokenizer, "segment ends are texts"
    assert not SepLLMConfig(keep=(9,), keep_after=4, segment_ends=()).needs_tokenizer


@pytest.mark.parametrize("nothing", [0, {"digits": 0}, [[0, ["digits"]], [3, []]]])
def test_spans_of_nothing_take_any_ends(nothing):
    """As one tries 0, 2 and 4 tokens, the ends staying as they are."""
    config = SepLLMConfig.from_dict({"keep": ["digits"], "keep_after": nothing, "segment_ends": []})
    assert config == SepLLMConfig(keep=("digits",))
    assert SepLLMConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"keep": "digits"}, ["keep='digits'", "must be a list of separators, special"]),
        ({"keep": ["digits", -1]}, ["keep holds -1", "at least 0"]),
        ({"keep": [True]}, ["keep holds True"]),
        ({"keep": [""]}, ["keep holds ''"]),
        (
            {"keep": ["digits"], "separators": ["."]},
            ["separators=('.',) with keep=['digits']", "add it, or drop separators"],
        ),
        (
            {"keep": ["digits"], "separator_match": "composed"},
            ["separator_match='composed' with keep=['digits']"],
        ),
        ({"keep": [5], "separator_token_ids": [3]}, ["separator_token_ids=[3] with keep=[5]"]),
        ({"policy": "streaming", "keep": ["digits"]}, ["keep=['digits'] with policy='streaming'"]),
        ({"keep_after": 33}, ["keep_after=33", "from 0 to 32 tokens", "keep_after=4"]),
        ({"keep_after": -1}, ["keep_after=-1", "from 0 to 32 tokens"]),
        ({"keep_after": True}, ["keep_after=True", "number of tokens"]),
        ({"keep_after": "4"}, ["keep_after='4'", "number of tokens"]),
        ({"keep_after": {"separators": 2.5}}, ["keep_after=2.5", "number of tokens"]),
        ({"keep": [], "keep_after": 4}, ["keep_after=4 with keep=[]", "add to keep"]),
        ({"keep": [1], "keep_after": {"1": 4}}, ["holds '1'", "keep_after=[[4, [1]]]"]),
        ({"keep": [1], "keep_after": [[4, [True]]]}, ["keep_after holds True", "not in keep"]),
        ({"keep_after": {"digits": 4}}, ["keep_after holds 'digits'", "not in keep: add it"]),
        ({"keep_after": [[4, ["digits"]]]}, ["keep_after holds 'digits'", "not in keep"]),
        ({"keep_after": [[4, [["x"]]]]}, ["keep_after holds ['x']", "not in keep"]),
        ({"keep_after": [4, 2]}, ["keep_after=[4, 2]", "number of tokens"]),
        (
            {"policy": "streaming", "keep_after": 4},
            ["keep_after=[[4, ['separators']]] with policy='streaming'"],
        ),
        ({"keep_after": 4, "segment_ends": "."}, ["segment_ends='.'", "list of texts and token"]),
        ({"keep_after": 4, "segment_ends": [""]}, ["segment_ends=['']", "list of texts"]),
        ({"keep_after": 4, "segment_ends": [-1]}, ["segment_ends=[-1]", "list of texts"]),
        ({"segment_ends": ["."]}, ["segment_ends=['.'] without keep_after", "set keep_after"]),
        ({"keep_after": 4, "segment_ends": MANY}, ["segment_ends holds 1001 texts", "most 1000"]),
        ({"keep": MANY}, ["keep holds 1001 texts", "give token ids"]),
        ({"separators": MANY}, ["separators holds 1001 texts", "give token ids"]),
        ({"window_size": 0}, ["window_size=0", "at least 1", "256"]),
        ({"window_size": 1.5}, ["window_size=1.5", "whole number"]),
        ({"window_size": "64"}, ["window_size='64'", "whole number"]),
        ({"window_size": True}, ["window_size=True", "whole number"]),
        ({"window_size": None}, ["window_size=None", "whole number"]),
        ({"window_size": MAX_TOKENS + 1}, ["at most", str(MAX_TOKENS)]),
        ({"num_sink_tokens": -1}, ["num_sink_tokens=-1", "at least 0"]),
        ({"max_separator_tokens": 0}, ["max_separator_tokens=0", "at least 1", "null"]),
        ({"policy": "h2o"}, ["policy='h2o'", "'sepllm'", "'streaming'", "'fixed_interval'"]),
        ({"policy": ["sepllm"]}, ["policy=['sepllm']", "one of"]),
        ({"separator_match": "regex"}, ["separator_match='regex'", "'composed'"]),
        ({"position_mode": "rope"}, ["position_mode='rope'", "'cache'"]),
        ({"separators": ".,"}, ["separators='.,'", "list"]),
        ({"separators": []}, ["separators=[]", "non-empty"]),
        ({"separators": [".", ""]}, ["separators=", "non-empty texts"]),
        ({"separators": [13]}, ["separators=[13]", "texts"]),
        ({"separator_token_ids": 13}, ["separator_token_ids=13", "list"]),
        ({"separator_token_ids": [13, -1]}, ["separator_token_ids holds -1", "at least 0"]),
        ({"separator_token_ids": [True]}, ["separator_token_ids holds True"]),
        ({"separator_token_ids": ["."]}, ["separator_token_ids holds '.'"]),
        ({"dense_layers": 3}, ["dense_layers=3", "list of layer indices"]),
        ({"prefill_kernel": "cutlass"}, ["prefill_kernel='cutlass'", "'triton', 'xformers'"]),
        ({"dense_layers": [True]}, ["dense_layers=[True]", "list of layer indices"]),
        ({"dense_layers": ["0"]}, ["dense_layers=['0']", "list of layer indices"]),
        ({"interval": 5}, ["interval=5", "policy='sepllm'", "fixed_interval"]),
        ({"policy": "fixed_interval"}, ["without interval", "interval=5"]),
        ({"policy": "fixed_interval", "interval": 0}, ["interval=0", "at least 1"]),
        (
            {"policy": "streaming", "max_separator_tokens": 8},
            ["max_separator_tokens=8", "policy='streaming'"],
        ),
        ({"window_sise": 64}, ["'window_sise'", "did you mean 'window_size'"]),
        ({"budget": 64}, ["'budget'", "known:", "window_size"]),
        ({3: 64}, ["option 3", "known:"]),
        ({"planned_kept_share": 0}, ["planned_kept_share=0", "above 0 and at most 1", "0.2"]),
        ({"planned_kept_share": -0.1}, ["planned_kept_share=-0.1", "above 0"]),
        ({"planned_kept_share": 1.5}, ["planned_kept_share=1.5", "at most 1"]),
        ({"planned_kept_share": 10**400}, ["at most 1"]),
        ({"planned_kept_share": float("nan")}, ["planned_kept_share=nan", "above 0"]),
        ({"planned_kept_share": True}, ["planned_kept_share=True", "number"]),
        ({"planned_kept_share": "20%"}, ["planned_kept_share='20%'", "number"]),
        ({"planning_text": 5}, ["planning_text=5", "path of a UTF-8 text file"]),
        ({"planning_text": " "}, ["planning_text=' '", "path"]),
        (
            {"planned_kept_share": 0.2, "planning_text": "a.txt"},
            ["planned_kept_share=0.2", "planning_text='a.txt'", "drop one of the two"],
        ),
        (
            {"policy": "streaming", "planned_kept_share": 0.2},
            ["planned_kept_share=0.2", "policy='streaming'"],
        ),
        (
            {"policy": "fixed_interval", "interval": 5, "planning_text": "a.txt"},
            ["planning_text='a.txt'", "policy='fixed_interval'"],
        ),
        ([("window_size", 64)], ["expected a mapping"]),
        ("window_size", ["'window_size'", "expected a mapping"]),
    ],
)
def test_errors_name_value_limit_and_remedy(options, parts):
    with pytest.raises(ConfigError) as caught:
        SepLLMConfig.from_dict(options)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("start_size", ["num_sink_tokens"]),  # StreamingLLM
        ("recent_size", ["window_size", "own token"]),
        ("enable_pos_shift", ["position_mode='cache'"]),
        ("init_cache_size", ["num_sink_tokens"]),  # SepLLM, SepCache
        ("sep_cache_size", ["max_separator_tokens"]),
        ("local_size", ["window_size"]),
        ("cache_size", ["no size of the whole cache", "max_separator_tokens"]),
        ("SEP_ACCUMULATION", ["max_separator_tokens"]),
        ("USE_MAX_SEP_CACHE", ["max_separator_tokens"]),
        ("PADDING_ID", ["leave it out"]),
        ("Separator_Token_Ids", ["separator_token_ids"]),
        ("separator-token-ids", ["separator_token_ids"]),
        ("sep_token_ids", ["separator_token_ids"]),
        ("window_length", ["window_size", "SinkCache"]),  # transformers
        ("n_sink", ["num_sink_tokens"]),  # kvpress
        ("compression_ratio", ["no budget ratio", "separators"]),
        ("attention_sink_size", ["num_sink_tokens"]),  # attention_sinks
        ("attention_sink_window_size", ["window_size"]),
        ("heavy_hitter_size", ["not attention scores", "separators"]),  # H2O
        ("heavy_ratio", ["not attention scores"]),
        ("max_capacity_prompt", ["no size of the whole cache"]),  # SnapKV
    ],
)
def test_options_of_other_projects_are_named(name, parts):
    with pytest.raises(ConfigError) as caught:
        SepLLMConfig.from_dict({name: 4})
    message = str(caught.value)
    assert message.startswith(f"unknown SepLLM option {name!r}: ")
    assert "known:" not in message
    for part in parts:
        assert part in message


def test_names_of_other_projects_are_not_our_own_and_point_to_our_own():
    known = {field.name for field in fields(SepLLMConfig)}
    assert not known & OTHER_NAMES.keys()
    for name, sentence in OTHER_NAMES.items():
        assert name == name.lower()
        if sentence.startswith("use "):
            assert sentence.split()[1].strip(",").split("=")[0] in known


def test_default_separators_are_the_papers_nine():
    assert len(DEFAULT_SEPARATORS) == len(set(DEFAULT_SEPARATORS)) == 9


@pytest.mark.parametrize(
    ("given", "found"), [([], ()), ([0, -1], (0, 5)), ([5, -1, 5], (5,)), ([-6], (0,))]
)
def test_dense_layers_of_a_model(given, found):
    plan = LayerPlan.of(given, 6)
    assert plan.indices == found
    assert LayerPlan.of(plan.indices, 6) == plan
    assert [plan[i] is Layer.DENSE for i in range(6)] == [i in found for i in range(6)]


@pytest.mark.parametrize("index", [6, -7, 100])
def test_dense_layers_that_do_not_exist(index):
    with pytest.raises(ConfigError, match=f"holds {index}: the model has 6 layers, .* -6 to 5"):
        LayerPlan.of([0, index], 6)


def test_every_layer_dense():
    with pytest.raises(ConfigError, match=r"names all 2 layers, .* use another attention backend"):
        LayerPlan.of([0, -1], 2)
