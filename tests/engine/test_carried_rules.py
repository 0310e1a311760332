"""Models and adapters that carry the rule they were trained under, up to where workers start."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
from helpers import MODEL, ROOT

from vllm_sepllm.carried import differences, with_rule, write_rule
from vllm_sepllm.config import ConfigError, SepLLMConfig
from vllm_sepllm.engine.doctor import diagnose

pytestmark = pytest.mark.engine

RULE = {"num_sink_tokens": 2, "window_size": 48, "max_separator_tokens": 30}


@pytest.fixture
def trained(tmp_path):
    """The demo model, with a rule in its config.json."""

    def make(rule):
        folder = tmp_path / f"model {len(list(tmp_path.iterdir()))}"
        shutil.copytree(MODEL, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "sepllm": rule}))
        return str(folder)

    return make


@pytest.fixture
def said(monkeypatch):
    """What start-up logs, by level."""
    from vllm_sepllm.engine.startup import prepare, settings
    from vllm_sepllm.engine.worker import adapters

    lines = {"info": [], "warning": []}
    spy = SimpleNamespace(
        info_once=lambda text, *args: lines["info"].append(text % args),
        warning_once=lambda text, *args: lines["warning"].append(text % args),
        error=lambda *args: None,
    )
    for module in (prepare, settings, adapters):
        monkeypatch.setattr(module, "logger", spy)
    monkeypatch.setattr(prepare, "caution", lambda found: None)
    return lines


def configuration(model, sepllm=None, backend="sepllm"):
    from vllm.engine.arg_utils import EngineArgs

    options = {"model": model, "attention_backend": backend, "max_model_len": 512}
    if sepllm is not None:
        options["additional_config"] = {"sepllm": sepllm}
    return EngineArgs(**options).create_engine_config()


def test_recipes_know_the_ranks_of_adapters():
    """``post_train.py`` prints the line that serves an adapter; it does not import vLLM."""
    from typing import get_args

    from vllm.config.lora import MaxLoRARanks

    text = (ROOT / "examples/training/post_train.py").read_text(encoding="utf8")
    [ranks] = re.findall(r"^RANKS = (.*?)  #", text, re.MULTILINE)
    assert ranks == ", ".join(map(str, get_args(MaxLoRARanks)))


def options_of(config):
    from vllm_sepllm.engine.startup.settings import Settings

    return Settings.of(config).config


def test_a_model_is_served_as_it_was_trained(trained, said):
    found = options_of(configuration(trained(RULE)))
    assert {name: getattr(found, name) for name in RULE} == RULE
    [line] = said["info"]
    assert "2 sinks, window of 48 tokens" in line
    assert "the rule is that of the model's config.json" in line
    assert not said["warning"]
    said["info"].clear()
    configuration(MODEL)
    assert "the rule is that" not in said["info"][0]


def test_options_beside_a_rule(trained, said):
    """Those of the server go with it; one that contradicts it is taken, and warned of once."""
    model = trained(RULE)
    found = options_of(configuration(model, {"position_mode": "cache", "planned_kept_share": 0.5}))
    assert (found.window_size, found.position_mode) == (48, "cache")
    assert not said["warning"]
    said["info"].clear()
    found = options_of(configuration(model, {"window_size": 64, "separators": [".", "\n"]}))
    assert (found.num_sink_tokens, found.window_size) == (2, 64)
    assert found.max_separator_tokens == 30
    [warning] = said["warning"]
    assert "window_size is 64 here and was 48" in warning
    assert 'separators is [".", "\\n"] here and was' in warning
    assert "num_sink_tokens" not in warning
    assert "the rule is that" not in said["info"][0]


@pytest.mark.parametrize(
    ("rule", "given", "found"),
    [
        (
            {**RULE, "separator_token_ids": [1, 2]},
            {"separators": ["."]},
            {"separators": (".",), "separator_token_ids": None, "window_size": 48},
        ),
        (
            {"policy": "fixed_interval", "interval": 5, "window_size": 48},
            {"policy": "streaming"},
            {"policy": "streaming", "interval": None, "window_size": 48},
        ),
        (
            {**RULE, "keep": ["digits"], "keep_after": 3},
            {"keep": ["names"]},
            {"keep": ("names",), "keep_after": (), "max_separator_tokens": 30},
        ),
        (
            {**RULE, "separator_token_ids": [1, 2]},
            {"keep": ["digits"]},
            {"keep": ("digits",), "separator_token_ids": None},
        ),
    ],
)
def test_what_is_given_takes_the_place_of_what_depends_on_it(rule, given, found):
    config = with_rule(given, rule, "the model")
    assert {name: getattr(config, name) for name in found} == found


def test_what_means_the_same_is_no_difference():
    trained = {
        "keep": ["names", "digits", "separators"],
        "keep_after": 4,
        "separators": ["default"],
        "dense_layers": [0, -1],
    }
    here = {
        "keep": ["digits", "separators", "names"],
        "keep_after": 4,
        "dense_layers": [31, 0],
    }

    def different(**options):
        given = SepLLMConfig.from_dict({**here, **options})
        return differences(given, SepLLMConfig.from_dict(trained), 32)

    assert different() == []
    assert len(different(keep_after={"digits": 4, "names": 3})) == 1
    assert len(different(dense_layers=[0, 30])) == 1


def test_options_that_need_the_rule(trained, said):
    """They cannot be used without it: for the names whose tokens they keep, or for a long text."""
    rule = {**RULE, "keep": ["special", "digits", "names"], "keep_after": [[6, ["names"]]]}
    options = {"keep_after": {"names": 2}, "position_mode": "cache"}
    model = trained(rule)
    diagnosis = diagnose(model, options)
    assert not diagnosis.problems
    assert "window 48" in next(found for what, found, _ in diagnosis.rows if what == "options")
    from vllm.engine.arg_utils import EngineArgs

    args = EngineArgs(
        model,
        attention_backend="sepllm",
        max_model_len=100_000,
        additional_config={"sepllm": options},
    )
    assert args.create_engine_config().model_config.max_model_len == 100_000


@pytest.mark.parametrize("keep", [5, None, True, 1.5, "facts"])
def test_keep_that_is_no_list(keep):
    with pytest.raises(ConfigError, match="keep="):
        with_rule({"keep": keep}, RULE, "the model")


def test_a_preset_comes_before_the_rule(trained, said):
    found = options_of(configuration(trained(RULE), {"preset": "pythia"}))
    assert (found.window_size, found.num_sink_tokens, found.max_separator_tokens) == (128, 3, None)
    assert "window_size is 128 here and was 48" in said["warning"][0]


def test_a_rule_that_is_all_ids_needs_no_options(trained, said):
    rule = {**RULE, "separator_token_ids": [15, 17], "dense_layers": [0]}
    found = options_of(configuration(trained(rule)))
    assert found.kept_ids == (15, 17)
    assert found.dense_layers == (0,)


@pytest.mark.parametrize(
    ("rule", "options", "sentences"),
    [
        ({"window": 3}, None, ["config.json carries a rule that cannot be read", "'window'"]),
        ([1], None, ["config.json carries a rule that cannot be read", "no mapping"]),
        (
            {"policy": "streaming"},
            {"max_separator_tokens": 5},
            ["max_separator_tokens=5 with policy='streaming'", "config.json carries it"],
        ),
        (RULE, {"windowsize": 5}, ["unknown SepLLM option 'windowsize'"]),
    ],
)
def test_rules_that_cannot_be_used(trained, said, rule, options, sentences):
    with pytest.raises(ValueError, match="SepLLM") as raised:
        configuration(trained(rule), options)
    for sentence in sentences:
        assert sentence in str(raised.value)
    if options == {"windowsize": 5}:
        assert "carries" not in str(raised.value)


def test_another_backend_for_a_trained_model_is_warned_of(trained, said):
    configuration(trained(RULE), backend=None)
    [warning] = said["warning"]
    assert "was trained under SepLLM attention" in warning
    assert "--attention-backend sepllm" in warning
    said["warning"].clear()
    configuration(MODEL, backend=None)
    assert not said["warning"]


def test_adapters(tmp_path, said):
    """Loaded by the worker's manager, whatever is found beside them."""
    from vllm_sepllm.engine.worker.adapters import check_adapters

    served = SepLLMConfig(window_size=64)
    manager = SimpleNamespace(_load_adapter=lambda request: f"loaded {request.lora_name}")
    check_adapters(manager, served, 2)

    def load(name):
        request = SimpleNamespace(lora_name=name, lora_path=str(tmp_path / name))
        assert manager._load_adapter(request) == f"loaded {name}"
        found, said["warning"][:] = list(said["warning"]), []
        return found

    for name in ("none", "same", "other", "broken"):
        (tmp_path / name).mkdir()
    write_rule(tmp_path / "same", SepLLMConfig(window_size=64, planned_kept_share=0.2))
    write_rule(tmp_path / "other", SepLLMConfig(window_size=128))
    (tmp_path / "broken/sepllm.json").write_text("{")
    assert load("none") == load("same") == []
    [warning] = load("other")
    assert "adapter 'other' was trained under another rule" in warning
    assert "window_size is 64 here and was 128" in warning
    for content in (b"{", b"\xff\xfe{", b"[" * 200_000, b'{"window_size": 0}', b"null"):
        (tmp_path / "broken/sepllm.json").write_bytes(content)
        [warning] = load("broken")
        assert "sepllm.json carries a rule that cannot be read" in warning


def test_writing_and_reading(tmp_path):
    from vllm_sepllm.carried import read_rule

    config = SepLLMConfig.from_dict({"preset": "facts", "window_size": 99})
    write_rule(tmp_path, config)
    assert read_rule(tmp_path) == config
    (tmp_path / "sepllm.json").write_text('{"window_size": 0}')
    with pytest.raises(ConfigError, match="cannot be read"):
        read_rule(tmp_path)
