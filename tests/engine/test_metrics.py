"""The metrics: what the scheduler counts is what happened, and where it is shown."""

import logging
import os
import pickle
import re
import subprocess
import sys
from itertools import chain
from types import SimpleNamespace

import msgspec
import prometheus_client
import pytest
from helpers import MODEL, ROOT, find_separators
from simulation import Simulation
from test_scheduling import WORDS, next_token

from vllm_sepllm.engine.scheduling.spec import KeptSpec, WindowSpec
from vllm_sepllm.engine.scheduling.tally import KEPT, LIMITS, STATS_KEY, WINDOW, put, take

pytestmark = pytest.mark.engine

SEPARATORS = list(find_separators()[:2])
SIZE = 32
KINDS = {WindowSpec: WINDOW, KeptSpec: KEPT}


def simulate(sepllm=(), **options):
    given = {"window_size": 64, "separator_token_ids": SEPARATORS, **dict(sepllm)}
    sizes = {"num_blocks": 400, "block_size": SIZE, "max_model_len": 1024}
    return Recorded(given, next_token, **{**sizes, "max_num_batched_tokens": 256, **options})


class Recorded(Simulation):
    """A simulation that collects what the scheduler counts, with the pages held in every step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.counts = []
        update = self.scheduler.update_from_output

        def recorded(*args):
            outputs = update(*args)
            [stats] = [each.scheduler_stats for each in outputs.values() if each.scheduler_stats]
            encoded = msgspec.msgpack.encode(stats)  # as it goes to the process of the server
            counts = take(msgspec.msgpack.decode(encoded, type=type(stats)))
            assert counts == take(stats)
            assert stats.ec_connector_stats is None
            self.counts.append(counts)
            return outputs

        self.scheduler.update_from_output = recorded
        reports = self.scheduler._reports
        report = reports.report
        reports.report = lambda is_last, share: report(True, share)  # with every step

    def sum(self, name, label=None):
        found = (counts.get(name, 0 if label is None else {}) for counts in self.counts)
        return sum(value if label is None else value.get(label, 0) for value in found)


TEXT = [SEPARATORS[0] if i % 7 == 0 else WORDS[i % 9] for i in range(500)]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("num_dense", [0, 1])
@pytest.mark.parametrize(
    "sepllm",
    [{}, {"window_size": 1}, {"window_size": 600}, {"max_separator_tokens": 3}],
    ids=["default", "narrow", "wide", "bounded"],
)
def test_tokens_are_counted_as_they_leave_the_window(sepllm, asynchronous, num_dense):
    simulation = simulate(sepllm, asynchronous=asynchronous, num_dense=num_dense)
    simulation.add("it", TEXT, 20)
    simulation.settle()
    tokens = TEXT + simulation.answers["it"]
    # The last token is sampled and never computed; that one's query would see one token more.
    behind = max(0, len(tokens) - 1 - simulation.rule.window_size + 1)
    kept = simulation.rule.kept_flags(tokens)
    counted = simulation.sum("tokens_kept") + simulation.sum("tokens_dropped")
    assert counted % SIZE == 0
    assert behind - 2 * SIZE <= counted <= behind
    assert simulation.sum("tokens_kept") == kept[:counted].sum()


def test_tokens_of_a_cached_prefix_are_not_counted_again():
    simulation = simulate()
    for name, text in (("first", TEXT[:320]), ("second", TEXT)):
        simulation.add(name, text, 2)
        simulation.settle()
    assert simulation.cached["second"] == 320
    kept = simulation.rule.kept_flags(TEXT)
    # Of the first, tokens 0 to 255 leave the window. The second resumes behind them.
    assert simulation.sum("tokens_kept") == kept[:416].sum()
    assert simulation.sum("tokens_dropped") == (~kept[:416]).sum()


@pytest.mark.parametrize("num_dense", [0, 1])
def test_pages_found_copied_and_given_back(num_dense):
    simulation = simulate(num_dense=num_dense)
    for name, text in (("first", TEXT[:320]), ("second", TEXT)):
        simulation.add(name, text, 2)
        simulation.settle()
    kept = int(simulation.rule.kept_flags(TEXT[:320]).sum())
    assert kept % SIZE
    groups = {kind: len(simulation.groups[spec]) for spec, kind in KINDS.items()}
    assert simulation.sum("found", KEPT) == -(-kept // SIZE) * groups[KEPT]
    assert simulation.sum("found", WINDOW) == 2 * groups[WINDOW]  # of 64 tokens before its end
    assert simulation.sum("copies") == groups[KEPT]
    assert simulation.sum("returned", WINDOW) == 416 // SIZE * groups[WINDOW]
    assert simulation.sum("returned", KEPT) == 0


@pytest.mark.parametrize("num_dense", [0, 1])
def test_pages_held_are_those_that_are_not_free(num_dense):
    """Pages that requests share are held once."""
    simulation = simulate(num_dense=num_dense)
    for name in ("first", "second", "third"):
        simulation.add(name, TEXT[:320], 40)
        for _ in range(8):
            simulation.step()
            held = simulation.counts[-1]["held"]
            assert sum(held.values()) == simulation.num_held
            assert bool(num_dense) == ("full" in held)
    assert simulation.num_held > 10
    simulation.settle()
    assert set(simulation.counts[-1]["held"].values()) == {0}


def test_pages_of_the_stream_are_given_back_under_a_bound():
    simulation = simulate({"max_separator_tokens": 3})
    simulation.add("it", [SEPARATORS[0]] * 500, 4)
    simulation.settle()
    # Sinks on page 0; 437 tokens have left the window at the end, the newest 3 of them are seen.
    assert simulation.sum("returned", KEPT) == 437 // SIZE - 1


def test_shares_of_requests_and_of_the_traffic():
    simulation = simulate()
    for name, text in (("some", TEXT), ("none", WORDS[:1] * 500)):
        simulation.add(name, text, 1)
        simulation.settle()
    rule = simulation.rule
    shares = [counts["shares"] for counts in simulation.counts if "shares" in counts]
    texts = [
        [*text, *simulation.answers[name]]
        for name, text in (("some", TEXT), ("none", WORDS[:1] * 500))
    ]
    flags = [rule.kept_flags(text)[4:] for text in texts]
    assert shares == [[flags[0].mean()], [flags[1].mean()]]
    seen = [counts["seen_share"] for counts in simulation.counts if "seen_share" in counts]
    assert seen == [flags[0].mean(), sum(f.sum() for f in flags) / sum(f.size for f in flags)]


def test_refused_requests_are_counted_with_the_step_that_ends_them():
    simulation = simulate(num_blocks=12, max_model_len=352)
    simulation.add("it", [SEPARATORS[0]] * 340, 4)
    simulation.settle()
    assert simulation.finished == {"it": "error"}
    assert simulation.counts[-1]["refused"] == {"memory": 1}
    assert simulation.counts[-1]["held"] == {"window": 0, "kept": 0}
    assert "shares" not in simulation.counts[-1], "it is no part of the traffic that is served"


def test_requests_in_small_chunks_are_counted_once():
    simulation = simulate(num_blocks=20, max_model_len=512)
    simulation.add("it", [SEPARATORS[0]] * 300, 4)
    simulation.settle()
    assert simulation.finished == {"it": "length"}
    assert simulation.sum("small_chunks") == 1


def test_what_is_dropped_is_counted_where_nothing_is_kept():
    simulation = simulate(
        {"policy": "streaming", "num_sink_tokens": 0, "separator_token_ids": None}
    )
    simulation.add("it", TEXT, 2)
    simulation.settle()
    assert simulation.sum("tokens_kept") == 0
    assert simulation.sum("tokens_dropped") == (501 - 64) // SIZE * SIZE


def test_a_session_that_waits_for_its_user_does_not_hide_the_end_of_others():
    """No step follows that could tell it later."""
    simulation = simulate()
    reports = simulation.scheduler._reports
    simulation.turn("session", TEXT[:40], 2)
    simulation.settle()
    del reports.report  # as it is, twice a second at most
    reports._due = float("inf")
    simulation.add("it", TEXT, 2)
    simulation.settle()
    assert simulation.counts[-1]["shares"]
    assert sum(simulation.counts[-1]["held"].values()) == simulation.num_held > 0


def test_nothing_is_collected_without_statistics():
    simulation = simulate()
    simulation.scheduler.log_stats = False
    simulation.scheduler.update_from_output = type(simulation.scheduler).update_from_output.__get__(
        simulation.scheduler
    )
    simulation.add("it", TEXT, 4)
    simulation.settle()
    assert simulation.scheduler._tally.shares == []


def test_reports_are_rare():
    """However many pages there are, they take no more than a small share of the time."""
    from vllm_sepllm.engine.scheduling import tally

    now = [100.0]
    page = SimpleNamespace(block_id=1, is_null=False)
    null = SimpleNamespace(block_id=0, is_null=True)

    class Slow(dict):
        def values(self):
            now[0] += 0.01
            return super().values()

    counts = tally.Tally()
    reports = tally.Reports(
        counts, [(KEPT, SimpleNamespace(req_to_blocks=Slow(a=[null, page], b=[page])))]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tally, "monotonic", lambda: now[0])
        assert reports.report(False, None) == {"held": {KEPT: 1}}
        for _ in range(9):
            counts.copies += 1
            assert reports.report(False, None) is None
            now[0] += 0.5
        now[0] += 0.51  # 500 times as long as the report took
        assert reports.report(False, None) == {"held": {KEPT: 1}, "copies": 9}
        counts.shares.append(0.5)
        assert reports.report(False, 0.5) is None
        last = {"held": {KEPT: 1}, "shares": [0.5], "seen_share": 0.5}
        assert reports.report(True, 0.5) == last


class Stats(SimpleNamespace):
    pass


def test_what_a_connector_says_stays():
    stats = Stats(ec_connector_stats={"other": 1})
    put(stats, {"copies": 1})
    assert take(stats) == {"copies": 1}
    assert stats.ec_connector_stats == {"other": 1}
    assert take(stats) == {}
    stats.ec_connector_stats = None
    assert take(stats) == {}
    put(stats, {})
    assert stats.ec_connector_stats == {STATS_KEY: {}}
    assert take(stats) == {}
    assert stats.ec_connector_stats is None


def config_of(backend="sepllm", **options):
    from vllm.engine.arg_utils import EngineArgs

    given = {"additional_config": {"sepllm": options}} if backend == "sepllm" else {}
    return EngineArgs(MODEL, attention_backend=backend, **given).create_engine_config()


@pytest.fixture
def manager():
    """vLLM's manager of loggers for two engines, with ours."""
    from vllm.v1.metrics.loggers import StatLoggerManager

    from vllm_sepllm.engine.metrics import SepLLMStatLogger

    made = StatLoggerManager(config_of(dense_layers=[0]), engine_idxs=[0, 1])
    assert isinstance(made.stat_loggers[0], SepLLMStatLogger)
    return made


def record(manager, engine, **counts):
    from vllm.v1.metrics.stats import SchedulerStats

    stats = SchedulerStats()
    put(stats, counts)
    manager.record(stats, None, engine_idx=engine)


def shown():
    """Our lines of ``/metrics``: value by name and labels, those of the model left out."""
    text = prometheus_client.generate_latest().decode()
    lines = re.findall(r"^(vllm:sepllm_\w+)\{(.*)\} (.*)$", text, re.MULTILINE)
    found = {}
    for name, labels, value in lines:
        assert f'model_name="{MODEL}"' in labels
        rest = [each for each in labels.split(",") if not each.startswith("model_name")]
        found[name.removeprefix("vllm:sepllm_"), *sorted(rest)] = float(value)
    return found


def test_counts_are_shown_where_vllm_shows_its_own(manager):
    step = {
        "tokens_kept": 3,
        "tokens_dropped": 29,
        "copies": 1,
        "small_chunks": 1,
        "returned": {"window": 2},
        "found": {"window": 4, "kept": 6},
        "refused": {"positions": 1, "length": 2},
        "held": {"window": 7, "kept": 8, "full": 9},
        "shares": [0.17, 0.3],
        "seen_share": 0.2,
    }
    record(manager, 1, **step)
    record(manager, 1, **step)
    record(manager, 0, tokens_kept=1)
    found = shown()
    one = 'engine="1"'
    assert found["tokens_kept_total", one] == 6
    assert found["tokens_kept_total", 'engine="0"'] == 1
    assert found["tokens_dropped_total", one] == 58
    assert found["copies_on_write_total", one] == 2
    assert found["requests_in_small_chunks_total", one] == 2
    assert found["pages_returned_total", one, 'group="window"'] == 4
    assert found["pages_returned_total", one, 'group="kept"'] == 0
    assert found["prefix_hit_pages_total", one, 'group="kept"'] == 12
    assert found["requests_refused_total", one, 'reason="positions"'] == 2
    assert found["requests_refused_total", one, 'reason="memory"'] == 0
    assert found["requests_refused_total", one, 'reason="length"'] == 4
    assert found["pages_held", one, 'group="full"'] == 9
    assert found["request_kept_share_count", one] == 4
    assert found["request_kept_share_bucket", one, 'le="0.2"'] == 2
    assert found["request_kept_share_sum", one] == pytest.approx(0.94)
    assert found["seen_kept_share", one] == 0.2
    assert ("seen_kept_share", 'engine="0"') not in found, "no request of it has ended"
    from vllm_sepllm.engine.startup.settings import Settings

    plan = Settings.of(config_of(dense_layers=[0])).plan
    assert found["planned_kept_share", one] == pytest.approx(1.25 * plan.share)


@pytest.fixture
def lines(monkeypatch):
    """What our logger writes."""
    from vllm_sepllm.engine import metrics

    logging.getLogger("vllm.v1.metrics.loggers").setLevel(logging.INFO)
    written = []
    monkeypatch.setattr(metrics.logger, "info", lambda text, *args: written.append(text % args))
    yield written
    logging.getLogger("vllm.v1.metrics.loggers").setLevel(logging.NOTSET)


def test_a_line_beside_vllms_own(lines, manager):
    manager.log()
    assert lines == []
    record(manager, 1, tokens_kept=8, tokens_dropped=24, held={"window": 1200, "kept": 3})
    record(manager, 1, shares=[0.25], seen_share=0.25, refused={"memory": 1}, small_chunks=2)
    manager.log()
    [line] = lines
    assert line.startswith("Engine 001: SepLLM: dropped 75.0% of 32 tokens behind")
    assert "pages held: 1,200 window, 3 kept" in line
    assert "kept of the traffic: 25.0% (planned " in line
    assert "put into small chunks: 2 requests, refused: 1 requests" in line
    manager.log()
    assert lines == [line], "nothing has happened since"


def test_groups_of_a_models_own_layers(manager):
    """vLLM's sliding-window groups are held too; only their numbers say that they are there."""
    record(manager, 0, held={"window": 1, "kept": 2, "full": 3, "other": 4})
    assert shown()["pages_held", 'engine="0"', 'group="other"'] == 4
    assert ("pages_held", 'engine="1"', 'group="other"') not in shown()


CHILD = """
import pickle, sys
config = pickle.load(sys.stdin.buffer)
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.metrics.stats import SchedulerStats
manager = StatLoggerManager(config)
stats = SchedulerStats(ec_connector_stats={"sepllm": {"copies": 7}})
manager.record(stats, None)
from prometheus_client import generate_latest
print([line for line in generate_latest().decode().splitlines() if "write_total{" in line])
"""


def test_a_process_that_is_given_its_configuration_shows_them():
    """Ray Serve makes the configuration in another process than the engine's front end."""
    given = pickle.dumps(config_of())
    child = [sys.executable, "-c", CHILD]
    env = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO"}  # so that vLLM writes its own line
    result = subprocess.run(child, input=given, capture_output=True, env=env, timeout=300)
    assert result.returncode == 0, result.stderr.decode()[-3000:]
    assert b"vllm:sepllm_copies_on_write_total" in result.stdout
    assert b" 7.0" in result.stdout


def test_no_line_where_vllm_writes_none(lines):
    """With several servers none of them sees all statistics."""
    from vllm.v1.metrics.loggers import StatLoggerManager

    made = StatLoggerManager(config_of(), client_count=2)
    record(made, 0, tokens_kept=8)
    made.log()
    assert lines == []


def test_other_backends_have_vllms_loggers_only():
    from vllm.v1.metrics.loggers import StatLoggerManager

    made = StatLoggerManager(config_of("CPU_ATTN"))
    assert not [each for each in made.stat_loggers if "sepllm" in type(each).__module__]
    assert shown() == {}


def test_the_kinds_of_metrics_are_those_of_vllms_logger():
    """Under Ray Serve vLLM's metrics are Ray's; so are ours."""
    from vllm.v1.metrics.loggers import PrometheusStatLogger, StatLoggerManager

    class Counter(prometheus_client.Counter):
        pass

    class Logger(PrometheusStatLogger):
        _counter_cls = Counter

    made = StatLoggerManager(config_of(), custom_stat_loggers=[Logger])
    [engine] = made.stat_loggers[0]._engines.values()
    children = [
        *engine._counters.values(),
        *chain(*(d.values() for d in engine._labelled.values())),
    ]
    assert {type(child) for child in children} == {Counter}


def test_the_limits_that_requests_do_not_fit_into_are_explained():
    shown = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    assert {*re.findall(r'requests_refused_total\{reason="(\w+)"\}', shown)} == {*LIMITS}
