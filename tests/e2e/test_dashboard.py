"""Every query of the dashboard, asked of a Prometheus that asks vLLM's metrics with ours."""

import json
import math
import time

import prometheus_client
import pytest
from helpers import MODEL, ROOT
from prometheus import DASHBOARD, Prometheus, filled, panels
from tools_needed import program

from vllm_sepllm.engine.scheduling.tally import put

pytestmark = pytest.mark.e2e

SECONDS = 6
STEP = {
    "tokens_kept": 3,
    "tokens_dropped": 29,
    "copies": 1,
    "small_chunks": 1,
    "returned": {"window": 2, "kept": 1},
    "found": {"window": 4, "kept": 6},
    "refused": {"memory": 1, "positions": 1},
    "held": {"window": 7, "kept": 8},
    "shares": [0.17],
    "seen_share": 0.2,
}


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A Prometheus that has seen some seconds of what an engine reports."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.metrics.loggers import StatLoggerManager
    from vllm.v1.metrics.stats import IterationStats, PrefixCacheStats, SchedulerStats

    config = EngineArgs(MODEL, attention_backend="sepllm").create_engine_config()
    manager = StatLoggerManager(config)
    server, thread = prometheus_client.start_http_server(0, "127.0.0.1")
    binary = program("prometheus", package="prometheus")
    prometheus = Prometheus(binary, tmp_path_factory.mktemp("prometheus"), server.server_port)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        stats = SchedulerStats(prefix_cache_stats=PrefixCacheStats(requests=1, queries=9, hits=3))
        put(stats, STEP)
        iteration = IterationStats()
        iteration.time_to_first_tokens_iter.append(0.1)
        iteration.inter_token_latencies_iter.append(0.02)
        manager.record(stats, iteration)
        time.sleep(0.25)
    prometheus.until = time.time()  # queries are about these seconds, however late they come
    yield prometheus
    prometheus.stop()
    server.shutdown()
    thread.join()


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_queries(asked, panel):
    for target in panel["targets"]:
        query = filled(target["expr"], f"{SECONDS}s")
        results = asked.ask("query", query=query, time=asked.until)["result"]
        values = [float(result["value"][1]) for result in results]
        assert values, query
        assert all(map(math.isfinite, values)), query
        label = target["legendFormat"].partition("{{")[2].partition("}}")[0]
        assert all(label in result["metric"] for result in results) or not label


def test_what_is_asked_is_what_was_reported(asked):
    found = {panel["title"]: panel["targets"] for panel in panels()}

    def values(title, index=0):
        query = filled(found[title][index]["expr"], f"{SECONDS}s")
        results = asked.ask("query", query=query, time=asked.until)["result"]
        return {tuple(r["metric"].values()): float(r["value"][1]) for r in results}

    assert values("Pages held") == {("window",): 7, ("kept",): 8}
    assert values("Prompt tokens found") == {(): pytest.approx(1 / 3)}
    assert list(values("Share kept", 0).values()) == [0.2]
    assert values("Share kept", 2) == {(): pytest.approx(3 / 32)}
    returned = values("Pages given back early")
    assert returned[("window",)] == pytest.approx(2 * returned[("kept",)])


def test_variables_have_values(asked):
    dashboard = json.loads(DASHBOARD.read_text())
    for name, label in (("model", "model_name"), ("engine", "engine")):
        [variable] = [v for v in dashboard["templating"]["list"] if v["name"] == name]
        metric = variable["query"]["query"].partition("(")[2].partition(", ")[0]
        found = asked.ask(f"label/{label}/values", **{"match[]": metric})
        assert found == [MODEL if name == "model" else "0"]


def test_every_metric_of_ours_is_shown():
    from vllm_sepllm.engine import metrics

    text = DASHBOARD.read_text()
    names = {name for name, *_ in (*metrics.COUNTERS.values(), *metrics.LABELLED.values())}
    names |= {"pages_held", "planned_kept_share", "seen_kept_share", "request_kept_share"}
    assert [name for name in sorted(names) if f"vllm[:_]sepllm_{name}" not in text] == []


def test_panels_do_not_overlap():
    taken = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken
        taken |= cells
        assert panel["type"] == "row" or panel["description"]


def test_provisioning_names_what_is_there():
    yaml = pytest.importorskip("yaml", reason="needs PyYAML, which vLLM brings")
    folder = ROOT / "examples/grafana/provisioning"
    [provider] = yaml.safe_load((folder / "dashboards/sepllm.yml").read_text())["providers"]
    variable = provider["options"]["path"]
    assert (
        f'{variable[2:-1]}="$PWD/{DASHBOARD.parent.relative_to(ROOT)}"'
        in (ROOT / "examples/grafana/README.md").read_text()
    )
    [source] = yaml.safe_load((folder / "datasources/prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://127.0.0.1:9090"
