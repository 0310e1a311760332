"""What the scheduler tells users: cached tokens, the positions of the model, the traffic."""

import pytest
from helpers import find_separators
from simulation import Simulation
from test_scheduling import WORDS, answer, next_token

from vllm_sepllm.config import ConfigError
from vllm_sepllm.engine.scheduling import progress, scheduler
from vllm_sepllm.engine.scheduling.traffic import FEWEST_TOKENS, TrafficShare
from vllm_sepllm.planning import Plan

pytestmark = pytest.mark.engine

SEPARATORS = list(find_separators()[:2])
TRAINED = 2048  # positions of the demo model


def simulate(sepllm=(), **options):
    given = {"window_size": 64, "separator_token_ids": SEPARATORS, **dict(sepllm)}
    sizes = {"num_blocks": 400, "block_size": 32, "max_model_len": 1024}
    return Simulation(given, next_token, **{**sizes, "max_num_batched_tokens": 256, **options})


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    "sepllm",
    [
        {},
        {"num_sink_tokens": 0, "separator_token_ids": []},
        {"max_separator_tokens": 3},
        {"window_size": 600},
    ],
    ids=["default", "nothing kept", "bounded", "window"],
)
@pytest.mark.parametrize("num_dense", [0, 1])
def test_tokens_added_to_the_prefix_cache_are_counted(sepllm, asynchronous, num_dense):
    simulation = simulate(sepllm, asynchronous=asynchronous, num_dense=num_dense)
    text = [SEPARATORS[0] if i % 7 == 0 else WORDS[i % 9] for i in range(500)]
    for name, length in (("first", 300), ("second", 500)):
        simulation.add(name, text[:length], 4)
        simulation.settle()
    assert simulation.cached == {"first": 0, "second": 288}
    assert simulation.created == {"first": 288, "second": 192}


def test_nothing_is_added_to_a_cache_that_is_off():
    simulation = simulate(enable_prefix_caching=False)
    simulation.add("it", [WORDS[0]] * 300, 4)
    simulation.settle()
    assert simulation.created == {"it": 0}


def endless(sepllm=(), **options):
    sepllm = {"position_mode": "cache", **dict(sepllm)}
    return simulate(sepllm, max_model_len=8192, max_num_batched_tokens=2048, **options)


def test_a_text_that_outgrows_the_models_positions_is_refused():
    simulation = endless()
    simulation.add("separators", [SEPARATORS[0]] * (TRAINED + 1), 4)
    simulation.add("words", [WORDS[0]] * (TRAINED + 1), 4)
    simulation.settle()
    assert simulation.finished == {"separators": "error", "words": "length"}
    assert (
        "leave 2049 in the cache, more than the 2048 positions" in simulation.reasons["separators"]
    )
    assert "max_separator_tokens" in simulation.reasons["separators"]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("drafts", [False, True])
def test_an_answer_ends_where_the_models_positions_end(drafts, asynchronous):
    """As at ``max_model_len``: the last token is given and not computed any more."""
    prompt = [SEPARATORS[0]] * (TRAINED - 3)
    right = answer(prompt, 20)
    speculation = {
        "propose": lambda _, tokens: right[len(tokens) - len(prompt) :][:3],
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3},
    }
    simulation = endless(asynchronous=asynchronous, **(speculation if drafts else {}))
    simulation.add("it", prompt, 50)
    simulation.settle()
    assert simulation.finished == {"it": "length"}
    assert simulation.answers["it"] == answer(prompt, 3)


def test_with_a_bound_a_text_may_have_any_length():
    simulation = endless({"max_separator_tokens": 20})
    simulation.add("it", [SEPARATORS[0]] * 3000, 4)
    simulation.settle()
    assert simulation.finished == {"it": "length"}


@pytest.mark.parametrize(
    ("share", "warns"), [(0.2, False), (0.249, False), (0.151, False), (0.26, True), (0.14, True)]
)
def test_the_share_of_the_traffic_is_compared_with_the_plan(share, warns):
    traffic = TrafficShare(Plan(0.2, "sample English"))
    parts = [traffic.add(round(share * FEWEST_TOKENS / 4), FEWEST_TOKENS // 4) for _ in range(8)]
    assert [part is not None for part in parts] == [False] * 3 + [warns] + [False] * 4
    if warns:
        for figure in (f"{share:.1%}", "20.0%", "planned_kept_share", "planning_text"):
            assert figure in parts[3]


def test_the_warning_comes_once_in_traffic(monkeypatch):
    warnings = []
    simulation = simulate({"planned_kept_share": 0.9})
    monkeypatch.setattr(scheduler.logger, "warning", lambda *args: warnings.append(args))
    for i in range(25):
        simulation.add(f"r{i}", [SEPARATORS[0]] * 64 + [WORDS[0]] * 436, 1)
        simulation.settle()
    [(_, text)] = warnings
    assert "12.1% of" in text  # 60 separators of 496 tokens behind the sinks
    assert "planned for 90.0%" in text


def test_an_id_cannot_write_into_the_log(monkeypatch):
    """It is a client's, of any length."""
    lines = []
    monkeypatch.setattr(progress.logger, "error", lambda text, *args: lines.append(text % args))
    simulation = endless()
    simulation.add("a\nb\x1b" * 1000, [SEPARATORS[0]] * (TRAINED + 1), 4)
    simulation.settle()
    [line] = lines
    assert line.isprintable()
    assert len(line) < 500


def test_a_worker_that_keeps_other_tokens_is_noticed(monkeypatch):
    """A node that was started with other options, or runs another version of the package."""
    from vllm_sepllm import config as options

    class Elsewhere(Simulation):
        def _make_scheduler(self, config, kv_cache_config):
            monkeypatch.setattr(options, "__version__", "another")
            return super()._make_scheduler(config, kv_cache_config)

    given = {"window_size": 64, "separator_token_ids": SEPARATORS}
    with pytest.raises(ConfigError, match="a worker has other options, or another version"):
        Elsewhere(given, next_token, num_blocks=40, block_size=32)
