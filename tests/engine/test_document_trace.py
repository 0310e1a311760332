"""Questions about documents in little memory: what the prefix cache serves."""

import pytest
from chat_trace import BLOCK_SIZE
from document_trace import DocumentTrace

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def trace():
    return DocumentTrace.make()


@pytest.mark.parametrize(
    ("memory", "options"),
    [
        (0.35, {"window_size": 64}),
        (0.5, {"window_size": 256}),
        (0.35, {"window_size": 64, "max_separator_tokens": 128}),
    ],
)
def test_every_question_but_the_first_finds_its_document(trace, memory, options):
    """The memory is that part of what the documents take under full attention."""
    blocks = int(memory * len(trace) / BLOCK_SIZE)
    assert trace.run(options, blocks) >= trace.most


def test_full_attention_finds_few(trace):
    """In as much memory: the memory is tight."""
    assert trace.run(None, int(0.35 * len(trace) / BLOCK_SIZE)) < trace.most / 2
