"""Servers of several processes: equal to the reference, and gone when one of them dies.

Nothing may hang: open requests are answered with an error, the server ends by itself, says why,
and leaves no process behind.
"""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPException

import psutil
import pytest
from serving import SMALL_POOL, check_concurrent

pytestmark = pytest.mark.e2e

TWO_RANKS = (*SMALL_POOL, "--tensor-parallel-size", "2")
TWO_REPLICAS = (*SMALL_POOL, "--data-parallel-size", "2")
# vLLM binds each process to cores of its own, and these machines may have only one.
NO_BINDING = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


def outcome(request, stream):
    """How an open request ended: "error", "closed" without an answer, or its finish reason."""
    try:
        status, text = request.result()
    except (ConnectionError, HTTPException):
        return "closed"
    if stream:
        assert status == 200
        *_, text, done = [line.removeprefix("data: ") for line in text.splitlines() if line]
        assert done == "[DONE]"
    last = json.loads(text)
    if "error" not in last:
        return last["choices"][0]["finish_reason"]
    assert last["error"]["message"]
    assert last["error"]["code"] == 500
    assert stream or status == 500
    return "error"


def die(server, name):
    """Kill the process vLLM calls ``name`` while requests are open.

    Returns:
        How these ended, and the exit status of the server.
    """
    [victim] = server.processes(name)
    computing = server.processes("VLLM::EngineCore") + server.processes("VLLM::Worker")
    said_before = len(server.log.read_text())
    others = psutil.Process(server.process.pid).children(recursive=True)
    body = {"prompt": [5, 6, 7], "max_tokens": 2000, "ignore_eos": True}
    # They stand still meanwhile: on a loaded machine a request can end before the last is taken.
    for process in computing:
        process.suspend()
    with ThreadPoolExecutor(8) as threads:
        asked = [
            (threads.submit(server.ask, "completions", stream=stream, **body), stream)
            for stream in 4 * (False, True)
        ]
        while server.log.read_text()[said_before:].count("Added request") < len(asked):
            assert not any(request.done() for request, _ in asked)
            time.sleep(0.01)
        victim.kill()
        for process in computing:
            with suppress(psutil.NoSuchProcess):
                process.resume()
        outcomes = {outcome(request, stream) for request, stream in asked}
    status = server.process.wait(120)
    assert status >= 0, "ended by a signal"
    assert " ERROR " in server.log.read_text()[said_before:]
    _, left = psutil.wait_procs(others, 60)
    assert not left
    return outcomes, status


def test_the_engine_core_dies(servers):
    # The status is vLLM's own: 0 with one API server process, whatever the attention.
    outcomes, _ = die(servers(*SMALL_POOL), "VLLM::EngineCore")
    assert outcomes == {"error"}


def test_two_ranks(servers, book, reference_model, separator_ids):
    server = servers(*TWO_RANKS, env=NO_BINDING)
    check_concurrent(server, book, reference_model, separator_ids)


def test_a_rank_dies(servers):
    outcomes, _ = die(servers(*TWO_RANKS, env=NO_BINDING), "VLLM::Worker_TP1")
    assert outcomes == {"error"}


def test_two_replicas(servers, book, reference_model, separator_ids):
    server = servers(*TWO_REPLICAS, env=NO_BINDING)
    check_concurrent(server, book, reference_model, separator_ids)
    answered = server.metric("vllm:request_success_total", finished_reason="length")
    assert sum(answered.values()) == 12
    assert set(answered) == {"0", "1"}
    assert all(answered.values()), "one replica answered everything"


def test_a_request_no_replica_has_room_for(servers, separator_ids):
    """The limit is one replica's, although their blocks are added up in the front end."""
    server = servers(*TWO_REPLICAS, env=NO_BINDING)
    prompt = [separator_ids[0]] * 2000
    for _ in range(2):
        status, text = server.ask("completions", prompt=prompt, max_tokens=8)
        assert status == 400
        assert "more than the 65 there are" in json.loads(text)["error"]["message"]


def test_a_replica_dies(servers):
    """vLLM then ends the other replica too, and both API servers, not waiting for answers."""
    outcomes, status = die(servers(*TWO_REPLICAS, env=NO_BINDING), "VLLM::EngineCore_DP1")
    assert outcomes <= {"error", "closed", "abort"}
    assert outcomes != {"abort"}
    assert status != 0
