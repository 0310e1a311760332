"""Servers of several processes: equal to the reference, and gone when one of them dies.

Nothing may hang: open requests are answered with an error, the server ends by itself, says why,
and leaves no process behind.
"""

import json

import pytest
from serving import SMALL_POOL, check_concurrent, kill_while_busy

pytestmark = pytest.mark.e2e

TWO_RANKS = (*SMALL_POOL, "--tensor-parallel-size", "2")
TWO_REPLICAS = (*SMALL_POOL, "--data-parallel-size", "2")


def test_two_ranks(servers, book, reference_model, separator_ids):
    server = servers(*TWO_RANKS)
    check_concurrent(server, book, reference_model, separator_ids)


def test_a_rank_dies(servers):
    outcomes, _ = kill_while_busy(servers(*TWO_RANKS), "VLLM::Worker_TP1")
    assert outcomes == {"error"}


def test_two_replicas(servers, book, reference_model, separator_ids):
    server = servers(*TWO_REPLICAS)
    check_concurrent(server, book, reference_model, separator_ids)
    answered = server.metric("vllm:request_success_total", finished_reason="length")
    assert sum(answered.values()) == 6
    assert set(answered) == {"0", "1"}
    assert all(answered.values()), "one replica answered everything"
    assert server.metric("vllm:sepllm_request_kept_share_count") == answered


def test_a_request_no_replica_has_room_for(servers, separator_ids):
    """The limit is one replica's, although their blocks are added up in the front end."""
    server = servers(*TWO_REPLICAS)
    prompt = [separator_ids[0]] * 2000
    for _ in range(2):
        status, text = server.ask("completions", prompt=prompt, max_tokens=8)
        assert status == 400
        assert "more than the 65 there are" in json.loads(text)["error"]["message"]


def test_a_replica_dies(servers):
    """vLLM then ends the other replica too, and both API servers, not waiting for answers."""
    outcomes, status = kill_while_busy(servers(*TWO_REPLICAS), "VLLM::EngineCore_DP1")
    assert outcomes <= {"error", "closed", "abort"}
    assert outcomes != {"abort"}
    assert status != 0
