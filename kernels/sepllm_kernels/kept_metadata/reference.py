"""Reference of ``kept_metadata``: one token at a time."""

from __future__ import annotations

import torch

NO_SLOT = -1


def kept_metadata_reference(
    token_ids: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    rows: torch.Tensor,
    kept_table: torch.Tensor,
    token_codes: torch.Tensor,
    kept_prefix: torch.Tensor,
    stream_slots: torch.Tensor,
    stream_ranges: torch.Tensor,
    *,
    num_sink_tokens: int,
    window_size: int,
    page_size: int,
    interval: int = 0,
    max_separator_tokens: int | None = None,
    shifts: torch.Tensor | None = None,
    span_left: torch.Tensor | None = None,
) -> None:
    """Count a step's kept tokens, and find where they go and what each token sees of the stream.

    A token is kept if its position is below ``num_sink_tokens``, its id's code says so, or its
    position is a multiple of ``interval`` (SepLLM, arXiv 2412.12094, equation 1; the last one is
    FixLLM, its ablation). With ``span_left`` it is also kept if a token at most so many places
    before it keeps so many behind itself, and no segment ends in between.

    ``kept_prefix`` is a ring: position ``p`` of a request is at ``p % ring`` of its row. It must
    hold the counts of the ``window_size`` positions before the step and of the step's own.

    Args:
        token_ids: ``[num_tokens]`` int32, requests one after the other, then padding; ids outside
            the vocabulary are not kept for their id.
        query_start: ``[num_reqs + 1]`` int32, where each request's tokens begin.
        seq_lens: ``[num_reqs]`` int32, tokens, those of the step included.
        rows: ``[num_reqs]`` int, row of ``kept_prefix`` of each request.
        kept_table: ``[num_reqs, *]`` int32, page of each ``page_size`` stream entries.
        token_codes: ``[vocab_size]`` uint8: 1 if tokens of an id are kept; and with ``span_left``,
            twice the number of tokens that they keep behind themselves, at most 63, and 128 if they
            end a segment. Who keeps others is kept.
        kept_prefix: ``[max_num_reqs, ring]`` int32, kept tokens below a position; positions after
            the step's first are written.
        stream_slots: ``[num_tokens]`` int64, written: slot of each kept token, -1 for others.
        stream_ranges: ``[num_tokens, 2]`` int32, written: stream entries ``[start, limit)`` that
            each token sees, sinks apart if there is a bound; 0 for padding.
        num_sink_tokens, window_size: tokens.
        page_size: entries of a page.
        interval: tokens; 0 is none.
        max_separator_tokens: newest separators behind the window that are seen; ``None`` is all.
        shifts: ``[3, num_tokens]`` int32, written, for cache positions: positions that the stream's
            copy of a kept token's key is rotated back by to be at its entry, a token's query to
            meet the keys of its range, and to meet those of the sinks; 0 for padding.
        span_left: ``[max_num_reqs, ring]`` uint8, a ring like ``kept_prefix``: what the tokens
            before a position still keep from there on; positions after the step's first are
            written.
    """
    ring, vocab_size = kept_prefix.shape[1], token_codes.shape[0]
    stream_slots.fill_(NO_SLOT)
    stream_ranges.fill_(0)
    if shifts is not None:
        shifts.fill_(0)
    for req in range(seq_lens.shape[0]):
        first, stop = int(query_start[req]), int(query_start[req + 1])
        start = int(seq_lens[req]) - (stop - first)
        prefix = kept_prefix[int(rows[req])]
        left = 0 if span_left is None else int(span_left[int(rows[req]), start % ring])
        for token in range(first, stop):
            position, token_id = start + token - first, int(token_ids[token])
            entry = int(prefix[position % ring])
            code = int(token_codes[token_id]) if 0 <= token_id < vocab_size else 0
            kept = (
                position < num_sink_tokens
                or code & 1 > 0
                or (interval > 0 and position % interval == 0)
                or left > 0
            )
            if span_left is not None:
                left = 0 if code & 128 else max(left - 1, code >> 1 & 63, 0)
                span_left[int(rows[req]), (position + 1) % ring] = left
            prefix[(position + 1) % ring] = entry + kept
            if kept:
                page = int(kept_table[req, entry // page_size])
                stream_slots[token] = page * page_size + entry % page_size
            window_first = max(0, position - window_size + 1)
            limit = int(prefix[window_first % ring])
            stream_ranges[token, 1] = limit
            unseen = 0
            if max_separator_tokens is not None:
                sinks = min(num_sink_tokens, limit)
                unseen = max(0, limit - max_separator_tokens - sinks)
                stream_ranges[token, 0] = sinks + unseen
            if shifts is not None:
                shift = window_first - limit
                shifts[:, token] = torch.tensor([(position - entry) * kept, shift, shift + unseen])
