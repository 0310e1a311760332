"""`vllm serve MODEL --attention-backend sepllm`, over HTTP, as a user starts it.

Bad input gets one sentence with a 4xx, and the server goes on as if nothing had been.
"""

import json
import socket
import subprocess
import sys
import time
from itertools import pairwise

import numpy as np
import pytest
from helpers import MODEL, ROOT
from serving import BIN, NAME, SMALL_POOL, check_concurrent, environment, kill_while_busy

from vllm_sepllm.engine.compat import vllm_version
from vllm_sepllm.oracle.dense_mask import first_difference

pytestmark = pytest.mark.e2e

TOKENS = ("tokens_kept_total", "tokens_dropped_total")


@pytest.fixture
def server(servers):
    return servers(*SMALL_POOL)


def test_one_line_says_what_is_active(server):
    log = server.log.read_text().splitlines()
    lines = [line for line in log if "INFO" in line and "SepLLM attention:" in line]
    assert len(lines) == 1
    for part in ("policy=sepllm", "4 sinks", "window of 64 tokens", "9 separator ids"):
        assert part in lines[0]
    for part in ("block size 32", f"vLLM {vllm_version()}"):
        assert part in lines[0]


def test_concurrent_requests_equal_the_reference(server, book, reference_model, separator_ids):
    check_concurrent(server, book, reference_model, separator_ids)


def test_metrics(server, book, separator_ids):
    """Beside vLLM's own, and one line in its log now and then."""
    before = {name: only(server.metric(f"vllm:sepllm_{name}")) for name in TOKENS}
    tokens = server.complete(book[:1000], 24)
    flags = np.isin([*book[:1000], *tokens], separator_ids)
    flags[:4] = True
    behind = (1022 - 64 + 1) // 32 * 32  # as the last step begins; it computes the last but one
    kept = int(flags[:behind].sum())
    expected = dict(zip(TOKENS, (kept, behind - kept), strict=True))
    for name in TOKENS:
        assert only(server.metric(f"vllm:sepllm_{name}")) - before[name] == expected[name]
    server.ask("completions", prompt=[separator_ids[0]] * 2000, max_tokens=8)
    assert only(server.metric("vllm:sepllm_requests_refused_total", reason="memory")) >= 1
    assert only(server.metric("vllm:sepllm_pages_held", group="kept")) == 0
    assert only(server.metric("vllm:sepllm_request_kept_share_count")) >= 1
    deadline = time.monotonic() + 60  # vLLM logs its statistics every ten seconds
    while "SepLLM: dropped " not in server.log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def only(by_engine):
    [value] = by_engine.values()
    return value


def test_clients_that_leave_give_their_pages_back(server, book):
    """Disconnect in the middle of many long streams; afterwards the cache is empty."""
    body = {"model": NAME, "prompt": book[:900], "max_tokens": 900, "ignore_eos": True}
    data = json.dumps({**body, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
    head += "Content-Type: application/json\r\n\r\n"
    for _ in range(4):
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
            connection.sendall(head.encode() + data)
            received = b""
            while b"data: " not in received:
                received += connection.recv(1000)
            assert received.startswith(b"HTTP/1.1 200")
    server.wait_until_cache_is_empty()


def test_a_bad_option_ends_the_start_with_one_sentence():
    command = [str(BIN / "vllm"), "serve", MODEL, "--attention-backend", "SEPLLM"]
    command += ["--additional-config", '{"sepllm": {"window_size": 0}}']
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=180, cwd=ROOT, env=environment()
    )
    assert result.returncode != 0
    assert "SepLLM attention: window_size=0: must be at least 1" in result.stdout + result.stderr


@pytest.fixture
def check_goes_on(server, book, reference_model, separator_ids):
    """A function: the next ordinary request is answered rightly. That pages come back is looked at
    once, behind all bad input: those of one that was refused would be missing then too."""

    def check():
        prompt = book[500:600]
        tokens = server.complete(prompt)
        assert first_difference(reference_model, prompt, tokens, separator_ids, 4, 64) is None

    return check


def sentence_of(text):
    """The message of an error body; bodies that cannot be parsed get FastAPI's own format."""
    body = json.loads(text)
    return body["error"]["message"] if "error" in body else body["detail"]


def too_large(text):
    """The sentence of a request that does not fit, with value, limit and remedy."""
    sentence = sentence_of(text)
    for part in ("KV cache blocks under SepLLM attention", "more than the 65 there are", "shorten"):
        assert part in sentence
    assert "\n" not in sentence
    return sentence


REFUSED = [
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": []}, 400, "at least one prompt"),
    ({"prompt": [[]]}, 400, "prompt cannot be empty"),
    ({"prompt": None}, 400, "prompt"),
    ({"prompt": 5}, 400, "body.prompt"),
    ({"prompt": {"text": "a"}}, 400, "body.prompt"),
    ({"prompt": [5, "a"]}, 400, "valid integer"),
    ({"prompt": [5, 1.5]}, 400, "valid integer"),
    ({"prompt": [5] * 2048}, 400, "max_tokens must be at least 1, got 0"),
    ({"prompt": [5] * 2049}, 400, "maximum context length is 2048 tokens"),
    ({"prompt": [5] * 50000}, 400, "maximum context length is 2048 tokens"),
    ({"prompt": "word " * 5000}, 400, "maximum context length is 2048 tokens"),
    ({"prompt": "\ud800"}, 400, "TextInputSequence"),
    ({"prompt": [-1, 5]}, 400, "greater than or equal to 0"),
    ({"prompt": [5, 4096]}, 400, "4096 is out of vocabulary"),
    ({"prompt": [2**40]}, 400, "1099511627776 is out of vocabulary"),
    ({"prompt": [2**70]}, 400, "is out of vocabulary"),
    ({"max_tokens": 0}, 400, "max_tokens must be at least 1, got 0"),
    ({"max_tokens": -1}, 400, "max_tokens must be at least 1, got -1"),
    ({"max_tokens": 2049}, 400, "cannot be greater than max_model_len=2048"),
    ({"max_tokens": 10**30}, 400, "cannot be greater than max_model_len=2048"),
    ({"max_tokens": 1.5}, 400, "valid integer"),
    ({"max_tokens": "many"}, 400, "valid integer"),
    ({"min_tokens": 50}, 400, "min_tokens must be less than or equal to max_tokens=4"),
    ({"n": 0}, 400, "n must be at least 1, got 0"),
    ({"n": 10**6, "temperature": 1}, 400, "n must be at most"),
    ({"stop": 5}, 400, "body.stop"),
    ({"stop": ""}, 400, "stop cannot contain an empty string"),
    ({"stop": [1, 2]}, 400, "body.stop"),
    ({"stop_token_ids": [99999]}, 400, "out-of-vocab"),
    ({"logit_bias": {"99999": 1}}, 400, "out-of-vocab"),
    ({"logit_bias": {"-5": 1}}, 400, "out-of-vocab"),
    ({"logit_bias": {"word": 1}}, 400, "cannot be converted to integer token IDs"),
    ({"logit_bias": {str(i): 1 for i in range(100000)}}, 400, "out-of-vocab"),
    ({"allowed_token_ids": []}, 400, "empty"),
    ({"allowed_token_ids": [99999]}, 400, "out-of-vocab"),
    ({"temperature": -1}, 400, "temperature must be non-negative"),
    ({"temperature": float("nan")}, 400, "temperature must be a finite number"),
    ({"top_p": 2}, 400, "top_p must be in (0, 1]"),
    ({"logprobs": 1000}, 400, "greater than max allowed"),
    ({"prompt_logprobs": 1000}, 400, "greater than max allowed"),
    ({"seed": 2**70}, 400, "less than or equal to"),
    ({"structured_outputs": {"regex": "("}}, 400, "regex"),
    ({"prompt_embeds": "AAAA"}, 400, "--enable-prompt-embeds"),
    ({"vllm_xargs": {"sepllm": {"window_size": 5}}}, 400, "body.vllm_xargs.sepllm"),
    ({"model": "no-such-model"}, 404, "`no-such-model` does not exist"),
]


@pytest.mark.parametrize(("body", "status", "part"), REFUSED, ids=lambda x: str(x)[:40])
def test_refused(server, check_goes_on, body, status, part):
    defaults = {"prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True}
    found, text = server.ask("completions", **{**defaults, **body})
    assert found == status, text[:1000]
    assert part in sentence_of(text)
    check_goes_on()


BODIES = {
    "no JSON": (b'{"model": ', "JSON decode error"),
    "empty": (b"", "Field required"),
    "null": (b"null", "Field required"),
    "a list": (b"[1, 2]", "valid dictionary"),
    "no UTF-8": (b'{"model": "%s", "prompt": "a\xff\xfe"}' % NAME.encode(), "parsing the body"),
    "nested": (b"[" * 100000, "parsing the body"),
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_are_no_request(server, check_goes_on, name):
    data, part = BODIES[name]
    status, text = server.send("completions", data)
    assert status == 400
    assert part in sentence_of(text)
    check_goes_on()


# What vLLM's API defines as good input, although it may look bad. Unknown fields are ignored: other
# servers' clients send them. So are per-request options for SepLLM, which has none.
SAME_AS_WITHOUT = [
    {"no_such_option": 5},
    {"sepllm": {"window_size": 1}},
    {"extra_args": {"window_size": 1}},
    {"vllm_xargs": {"no_such_option": 5}},
    {"vllm_xargs": {"sepllm": "window_size=1"}},
    {"max_tokens": "24"},
    {"logit_bias": {str(token): 1.0 for token in range(4096)}},
    {"stop": ["no such text"]},
]


@pytest.mark.parametrize("body", SAME_AS_WITHOUT, ids=lambda x: str(x)[:40])
def test_ignored(server, book, reference_model, separator_ids, body):
    prompt = book[1000:1150]
    tokens = server.complete(prompt, **{"max_tokens": 24, **body})
    assert len(tokens) == 24
    assert first_difference(reference_model, prompt, tokens, separator_ids, 4, 64) is None


def test_bounded(server, book, reference_model, separator_ids):
    """A length within the model's but over what is left is cut to it, a bias to 100."""
    tokens = server.complete(book[:2000], max_tokens=2048)
    assert len(tokens) == 48
    assert first_difference(reference_model, book[:2000], tokens, separator_ids, 4, 64) is None
    assert server.complete([5, 6, 7], 4, logit_bias={"9": 1e30}) == [9, 9, 9, 9]


@pytest.mark.parametrize("prompt", [[5], [0], [4095]], ids=str)
def test_one_token(server, reference_model, separator_ids, prompt):
    tokens = server.complete(prompt)
    assert len(tokens) == 24
    assert first_difference(reference_model, prompt, tokens, separator_ids, 4, 64) is None


def test_one_separator(server, reference_model, separator_ids):
    tokens = server.complete([separator_ids[0]])
    assert (
        first_difference(reference_model, separator_ids[:1], tokens, separator_ids, 4, 64) is None
    )


def test_a_request_that_can_never_fit(server, check_goes_on, separator_ids):
    prompt = [separator_ids[0]] * 2000
    for body in (
        {"prompt": prompt},
        {"prompt": [[5, 6, 7], prompt]},
        {"prompt": prompt, "n": 3, "temperature": 1},
        {"prompt": prompt, "use_beam_search": True, "n": 2},
    ):
        status, text = server.ask("completions", max_tokens=8, **body)
        assert status == 400
        assert "the 2000 tokens of this request" in too_large(text)
        check_goes_on()


def test_a_chat_that_can_never_fit(server, check_goes_on):
    messages = [{"role": "user", "content": ".\n" * 995}]
    status, text = server.ask("chat/completions", messages=messages, max_tokens=8)
    assert status == 400
    too_large(text)
    check_goes_on()


def outgrowing(separator_ids):
    """A request that fits when it comes, and writes separators until nothing is left."""
    comma = separator_ids[0]
    body = {"prompt": [comma] * 1500, "max_tokens": 540, "logit_bias": {str(comma): 100}}
    return {**body, "ignore_eos": True}


def test_a_request_that_outgrows_the_cache(server, check_goes_on, separator_ids):
    status, text = server.ask("completions", **outgrowing(separator_ids))
    assert status == 400
    assert "the 2000 tokens" not in too_large(text)
    check_goes_on()


@pytest.mark.parametrize("samples", [{}, {"n": 2, "temperature": 1}], ids=["one", "two"])
def test_a_stream_that_outgrows_the_cache(server, check_goes_on, separator_ids, samples):
    """What was generated is there; then an event with the sentence instead of more."""
    body = {**outgrowing(separator_ids), **samples, "stream": True, "return_token_ids": True}
    status, text = server.ask("completions", **body)
    assert status == 200
    events = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert events[-1] == "[DONE]"
    too_large(events[-2])
    assert json.loads(events[-2])["error"]["code"] == 400
    chunks = [json.loads(event)["choices"][0] for event in events[:-2]]
    tokens = [token for chunk in chunks for token in chunk["token_ids"]]
    assert set(tokens) == {separator_ids[0]}
    assert len(tokens) > 100
    check_goes_on()


def test_a_stream_that_can_never_fit(server, check_goes_on, separator_ids):
    prompt = [separator_ids[0]] * 2000
    status, text = server.ask("completions", prompt=prompt, max_tokens=8, stream=True)
    assert status == 200  # sent before the engine is asked
    [event, done] = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert "the 2000 tokens of this request" in too_large(event)
    assert done == "[DONE]"
    check_goes_on()


def test_nothing_is_left_of_bad_input(server):
    server.wait_until_cache_is_empty()


def test_the_engine_core_dies(server):
    # The status is vLLM's own: 0 with one API server process, whatever the attention.
    outcomes, _ = kill_while_busy(server, "VLLM::EngineCore")
    assert outcomes == {"error"}


def test_endless_chat(servers):
    """A conversation twice as long as the model's positions: each turn computes its own tokens, and
    as many blocks are held at the end as at the beginning."""
    server = servers("--enforce-eager", command="examples/serve_endless.sh")
    command = [sys.executable, "examples/endless_chat.py", "--base-url", f"{server.url}/v1"]
    command += ["--turns", "8", "--words", "340"]
    shown = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment()
    )
    assert shown.returncode == 0, shown.stderr
    rows = [line.split()[:5] for line in shown.stdout.splitlines()[1:]]
    assert [int(row[0]) for row in rows] == list(range(1, 9))
    total, computed, blocks = ([int(row[i].replace(",", "")) for row in rows] for i in (1, 2, 4))
    assert total[-1] > 4096
    for now, (earlier, later) in zip(computed[1:], pairwise(total), strict=True):
        # The answer before may be cut into other tokens when it comes back as text; then nothing of
        # it is found. Of the block where it began nothing is, and the next block is not full.
        assert now <= later - earlier + 60 + 2 * 32
    for held, now in zip(blocks, computed, strict=True):
        recent = 255 + now
        assert held <= recent // 32 + 2 + 1 + (64 + recent) // 32 + 2
    assert max(blocks) < total[-1] // 32 // 2
    assert sum(held > 0 for held in blocks) >= 4, "answers end before they are looked at"
    log = server.log.read_text()
    assert "texts of up to 1048576 tokens in 324 of the model's 2048 positions" in log
