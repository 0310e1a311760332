# ruff: noqa: RUF001
"""What start-up looks up, plans and says, up to the point where workers start."""

import json
import shutil
from types import SimpleNamespace

import made_tokenizers
import pytest
from helpers import MODEL
from simulation import Simulation

from vllm_sepllm.samples import SAMPLES

pytestmark = pytest.mark.engine

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "torch_dtype": "float32",
}
CJK_MARKS = ["，", "。", "、", "？"]


def configuration(sepllm=None, **options):
    from vllm.engine.arg_utils import EngineArgs

    defaults = {"model": MODEL, "attention_backend": "sepllm", "max_model_len": 512}
    additional = {} if sepllm is None else {"additional_config": {"sepllm": sepllm}}
    return EngineArgs(**{**defaults, **additional, **options}).create_engine_config()


def plan(*args, **options):
    from vllm_sepllm.engine.startup.settings import Settings

    return Settings.of(configuration(*args, **options)).plan


@pytest.fixture
def said(monkeypatch):
    """What start-up logs, by level."""
    from vllm_sepllm.engine.startup import prepare as startup

    lines = {"info": [], "warning": []}
    spy = SimpleNamespace(
        info_once=lambda text, *args: lines["info"].append(text % args),
        warning_once=lambda text, *args: lines["warning"].append(text % args),
    )
    monkeypatch.setattr(startup, "logger", spy)
    monkeypatch.setattr(startup, "caution", lambda found: None)
    return lines


@pytest.fixture(scope="module")
def characters(tmp_path_factory):
    """A tokenizer with a token for every character of the sample texts."""
    folder = tmp_path_factory.mktemp("characters")
    alphabet = sorted({char for text in SAMPLES.values() for char in text})
    made_tokenizers.characters("".join(["□", *alphabet])).save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=["--tokenizer-mode mistral", "chosen by vLLM"])
def mistral(request, tmp_path):
    """Arguments for a model with Mistral's tokenizer."""
    made_tokenizers.write_tekken(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "vocab_size": 283}))
    if request.param == "chosen by vLLM":
        (tmp_path / "consolidated.safetensors").touch()
        return {"model": str(tmp_path)}
    return {"model": str(tmp_path), "tokenizer_mode": "mistral"}


def test_mistrals_tokenizer(mistral):
    from vllm.tokenizers import cached_tokenizer_from_config

    config = configuration(**mistral)
    tokenizer = cached_tokenizer_from_config(config.model_config)
    assert type(tokenizer).__name__ == "MistralTokenizer"
    ids = config.additional_config["sepllm"]["keep"]
    assert ids == sorted(20 + ord(char) for char in ".,?!;: \t\n")
    composed = configuration({"separator_match": "composed"}, **mistral)
    ids = composed.additional_config["sepllm"]["keep"]
    assert {tokenizer.decode([i]) for i in ids} == {*".,?!;: \t\n", " ,", " .", "\n\n"}
    named = configuration({"separators": ["cjk", "[INST]"]}, **mistral)
    ids = named.additional_config["sepllm"]["keep"]
    assert [tokenizer.decode([i]) for i in ids] == ["[INST]", "。", "，"]


def test_mistrals_tokenizer_with_given_ids(mistral):
    config = configuration({"separator_token_ids": [33, 66]}, **mistral)
    assert config.additional_config["sepllm"]["keep"] == [33, 66]


class Broken:
    def __len__(self):
        return 4096

    def __getattr__(self, name):
        raise RuntimeError(f"no {name} today")


def missing(*args):
    raise OSError("tokenizer.json is gone.")


@pytest.mark.parametrize("load", [lambda *args: Broken(), missing], ids=["broken", "missing"])
def test_given_ids_need_no_tokenizer(monkeypatch, said, load):
    from vllm_sepllm.engine.startup import prepare as startup
    from vllm_sepllm.planning import UNKNOWN_KEPT_SHARE

    monkeypatch.setattr(startup, "cached_tokenizer_from_config", load)
    guess = plan({"separator_token_ids": [13, 15]})
    assert guess.share == UNKNOWN_KEPT_SHARE
    assert "25.0% kept behind the window (a guess, " in said["info"][0]
    assert "2 separator ids ('<id 13>' '<id 15>')" in said["info"][0]
    assert plan({"separator_token_ids": [13], "planned_kept_share": 0.1}).share == 0.1
    assert plan({"separator_token_ids": []}).share == 0
    with pytest.raises(ValueError, match=r"SepLLM attention: the tokenizer.* set separator_token"):
        configuration()


@pytest.mark.parametrize("options", [{}, {"policy": "fixed_interval", "interval": 4}])
def test_policies_without_separators_do_not_load_a_tokenizer(monkeypatch, options):
    from vllm_sepllm.engine.startup import prepare as startup

    monkeypatch.setattr(startup, "cached_tokenizer_from_config", None)
    found = plan({"policy": "streaming", **options})
    assert (found.share, found.margin) == (0.25 if options else 0.0, 1.0)


def test_separators_beyond_the_models_vocabulary(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "vocab_size": 2}))
    with pytest.raises(ValueError, match="from the model's vocabulary size 2 on"):
        configuration(model=str(tmp_path), tokenizer=MODEL)


def test_memory_is_planned_for_the_sample_that_keeps_most(characters, said):
    found = plan({"separators": CJK_MARKS}, tokenizer=characters)
    chinese = SAMPLES["Chinese"]
    assert found.share == pytest.approx(sum(map(chinese.count, CJK_MARKS)) / len(chinese))
    assert (
        "12.4% kept behind the window (sample text: Chinese; planned_kept_share sets it)"
        in said["info"][0]
    )
    assert said["warning"] == []


def test_a_pool_that_is_small_for_the_planned_text(characters, monkeypatch):
    """Planned for English, of which these marks keep nothing, a start with 120 blocks was welcome,
    and a Chinese text was then refused. vLLM now refuses the start."""
    from vllm_sepllm.engine.scheduling import scheduler

    warnings = []
    monkeypatch.setattr(scheduler, "logger", SimpleNamespace(warning=warnings.append))

    def start(num_blocks, **options):
        return Simulation(
            {"separators": CJK_MARKS, **options},
            lambda *args: 0,
            num_blocks=num_blocks,
            max_model_len=16384,
            max_num_batched_tokens=2048,
            tokenizer=characters,
            hf_overrides={"max_position_embeddings": 16384},
        )

    too_small = r"To serve at least one request .*16384.* estimated maximum model length"
    with pytest.raises(ValueError, match=too_small):
        start(120)
    start(120, planned_kept_share=0.01)  # the user knows better
    ample = start(400)
    chinese = SAMPLES["Chinese"]
    share = sum(map(chinese.count, CJK_MARKS)) / len(chinese)
    kept = -(-int(4 + 1.25 * share * 16384) // 32)
    window = -(-(2048 + 255) // 32) + 1
    groups = ample.kv_cache_config.kv_cache_groups
    needed = sum(group.kv_cache_spec.max_memory_usage_bytes(ample.config) for group in groups)
    assert needed == (kept + window) * groups[0].kv_cache_spec.page_size_bytes
    with pytest.raises(ValueError, match=too_small):
        start(kept + window)
    start(kept + window + 1)  # one is the null block
    assert warnings == []


def test_a_given_share_has_no_margin(tmp_path):
    from vllm_sepllm.engine.scheduling.spec import KeptSpec
    from vllm_sepllm.engine.startup.settings import Settings

    text = tmp_path / "text"
    text.write_text("so it was, " * 100)
    expected = {}
    for options in ({"planned_kept_share": 0.25}, {"planning_text": str(text)}, {}):
        config = configuration(options)
        assert json.loads(json.dumps(config.additional_config)) == config.additional_config
        assert config.compute_hash()
        found = Settings.of(config).plan
        spec = KeptSpec(
            block_size=32,
            num_kv_heads=2,
            head_size=32,
            dtype=config.model_config.dtype,
            window_size=64,
            num_sink_tokens=0,
            planned_share=found.planned_share,
        )
        expected[found.source] = spec.expected_pages(32_000, 0), found.share
    assert expected["planned_kept_share"] == (250, 0.25)
    for source in ("planning_text", "sample text: JSON"):
        pages, share = expected[source]
        assert pages == pytest.approx(1.25 * share * 1000, abs=1)


def test_the_file_is_read_in_the_process_that_builds_the_configuration(tmp_path):
    from vllm_sepllm.engine.startup.settings import Settings

    text = tmp_path / "text"
    text.write_text("so it was, " * 100)
    config = configuration({"planning_text": str(text)})
    text.unlink()
    assert Settings.of(config).config.planning_text == str(text)
    assert Settings.of(config).rule.window_size == 256
    assert Settings.of(config).plan.source == "planning_text"


def test_a_planning_text_that_is_not_there():
    with pytest.raises(ValueError, match=r"SepLLM attention: planning_text='/no/text' cannot be"):
        configuration({"planning_text": "/no/text"})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"separators": [".", "。", "<nope>"]},
            "'。' '<nope>' are no single tokens in this tokenizer, so nothing is kept for them",
        ),
        ({"separators": [".", "¶"]}, "'¶' is no single token in this tokenizer"),
        ({"separators": ["default", "cjk"]}, "9 of 9 texts of 'cjk' ('。' '，'"),
        ({"separators": ["default", "multilingual"]}, "15 of 24 texts of 'multilingual' ('。'"),
        ({"separators": [".", "CJK"]}, "'CJK' (did you mean the list 'cjk'?) is no single token"),
        (
            {"separator_token_ids": [1]},
            "no sample text has any of the separators, so memory is planned as if nothing were",
        ),
    ],
)
def test_what_is_missing_is_named_in_one_warning_and_by_the_doctor(said, options, sentence):
    from vllm_sepllm.engine.doctor import diagnose

    configuration(options)
    [warning] = said["warning"]
    assert warning.startswith("SepLLM attention: ")
    assert sentence in warning
    assert warning.count(".") == 1 or "'.'" in warning or "planning_text" in warning
    diagnosis = diagnose(MODEL, options)
    notes = [found for what, found, good in diagnosis.rows if what == "kept" and not good]
    assert len(notes) == 1
    assert sentence in notes[0]
    assert diagnosis.problems == []


def test_default_separators_that_are_no_tokens_scare_nobody(characters, said):
    configuration(tokenizer=characters)  # has no tab
    assert said["warning"] == []
    assert "8 separator ids (" in said["info"][0]
    assert "but not '\\t')" in said["info"][0]
    configuration({"separators": ["default", "cjk"]}, tokenizer=characters)
    assert ["'cjk'" in line for line in said["warning"]] == [True]  # "．" and the wide space
    assert "\\t" not in said["warning"][0]


def test_scripts_of_which_next_to_nothing_is_kept(characters, said):
    configuration(tokenizer=characters)
    line = said["info"][0]
    assert "under 2% is kept of the sample texts Chinese, Japanese: separators=" in line
    assert 'separators=["default", "cjk"] keeps more' in line
    configuration({"separators": CJK_MARKS}, tokenizer=characters)
    assert "English" in said["info"][1].split("under 2%")[1]
    assert '"、", "？", "default", "arabic", "devanagari", "thai", "code"] keeps' in said["info"][1]
    configuration({"separators": ["multilingual"]}, tokenizer=characters)
    assert "under 2%" not in said["info"][2]


def test_the_doctor_says_what_memory_is_planned_for():
    from vllm_sepllm.engine.doctor import diagnose

    [row] = [row for row in diagnose(MODEL, {}).rows if row[0] == "planned kept share"]
    assert row == ("planned kept share", row[1], True)
    assert "(sample text: JSON)" in row[1]
    options = {"planned_kept_share": 0.05}
    [row] = [row for row in diagnose(MODEL, options).rows if row[0] == "planned kept share"]
    assert row[1].startswith("5.0% (planned_kept_share), but 27.0% of the sample text JSON")
    assert not row[2]


def test_the_doctor_says_no(monkeypatch, tmp_path):
    """Of a model that is not served, options that cannot be, and plugins that are not loaded."""
    from vllm_sepllm.engine.doctor import diagnose

    assert diagnose(MODEL, {}).problems == []
    [problem] = diagnose(MODEL, {"window_size": 0}).problems
    assert "window_size=0: must be at least 1" in problem
    [problem] = diagnose(str(tmp_path / "nowhere"), {}).problems
    assert "no such folder" in problem
    bloom = {"architectures": ["BloomForCausalLM"], "model_type": "bloom", "n_layer": 2}
    bloom |= {"n_head": 4, "hidden_size": 64, "vocab_size": 4096}
    shutil.copytree(MODEL, tmp_path / "bloom")
    (tmp_path / "bloom/config.json").write_text(json.dumps(bloom))
    [problem] = diagnose(str(tmp_path / "bloom"), {}).problems
    assert "ALiBi" in problem
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert any("VLLM_PLUGINS" in problem for problem in diagnose(None, {}).problems)


@pytest.mark.parametrize(
    ("options", "length", "level", "parts"),
    [
        # Fits: nothing to warn of.
        ({"separators": ["."]}, 8192, "info", ["up to 8192 tokens in about 598 of", "2048"]),
        ({"separator_token_ids": []}, 2**23, "info", ["in 260 of the model's 2048"]),
        ({"planned_kept_share": 0.2}, 9000, "info", ["in about 2008 of the model's 2048"]),
        # Does not: the length from which on it does not is below max_model_len.
        ({"planned_kept_share": 0.2}, 9300, "warning", ["of about 9200 tokens: set max_sep"]),
        ({"planned_kept_share": 1}, 8192, "warning", ["of about 2048 tokens: set max_sep"]),
    ],
)
def test_cache_positions_without_a_bound(said, options, length, level, parts):
    configuration({"position_mode": "cache", **options}, max_model_len=length)
    lines = [line for line in said[level] if "texts of up to" in line]
    assert len(lines) == 1
    for part in parts:
        assert part in lines[0]
    other = {"info": "warning", "warning": "info"}[level]
    assert not any("texts of up to" in line for line in said[other])


def test_a_window_beyond_the_models_positions_is_refused_without_a_bound_too():
    with pytest.raises(ValueError, match=r"num_sink_tokens \+ window_size is 2049: the cache must"):
        configuration({"position_mode": "cache", "window_size": 2045}, max_model_len=5000)
