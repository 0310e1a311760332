"""SepLLM as a dense mask: the oracle that everything else is compared with.

Slow and plain on purpose. Uses no code of the engine and none of the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PIECE = 4096


@dataclass(frozen=True)
class KeptAfter:
    """Tokens that are kept for what stands before them.

    Attributes:
        num_tokens: so many behind a token of an id are kept, unless a segment ends before.
        ends: ids that end a segment. Such a token is the last one kept, or keeps nothing itself.
    """

    num_tokens: Mapping[int, int]
    ends: Set[int]

    def kept(self, ids: Sequence[int]) -> list[bool]:
        """Which of ``ids`` are kept; by looking back from each."""
        found = []
        for position in range(len(ids)):
            is_kept, distance = False, 1
            while distance <= position and distance <= max(self.num_tokens.values(), default=0):
                before = ids[position - distance]
                if before in self.ends:
                    break
                is_kept = is_kept or self.num_tokens.get(before, 0) >= distance
                distance += 1
            found.append(is_kept)
        return found


def sepllm_mask(
    token_ids: Sequence[int],
    separator_ids: Sequence[int],
    num_sink_tokens: int,
    window_size: int,
    interval: int | None = None,
    max_separators: int | None = None,
    after: KeptAfter | None = None,
) -> torch.Tensor:
    """Which key each query sees (arXiv 2412.12094, equation 1).

    Args:
        token_ids: ``[num_tokens]`` the whole sequence.
        separator_ids: ids of separator tokens.
        num_sink_tokens: first tokens that stay visible.
        window_size: recent tokens that stay visible, the query's own included.
        interval: every so many tokens one stays visible too, from the first on.
        max_separators: of the separators behind the window, so many of the newest are visible.
        after: tokens that are kept like separators for what stands before them.

    Returns:
        ``[num_tokens, num_tokens]`` bool, rows are queries.
    """
    ids = torch.as_tensor(list(token_ids), dtype=torch.long)
    position = torch.arange(len(ids))
    query, key = position[:, None], position[None, :]
    separator = torch.isin(ids, torch.as_tensor(sorted(separator_ids), dtype=torch.long))
    kept = separator | (position < num_sink_tokens)
    if interval is not None:
        kept[::interval] = True
    if after is not None:
        kept |= torch.tensor(after.kept(ids.tolist()), dtype=torch.bool)
    in_window = (key <= query) & (key > query - window_size)
    behind = kept[None, :] & (key <= query - window_size)
    if max_separators is not None:
        is_sink = position < num_sink_tokens
        count = (kept & ~is_sink).cumsum(0)  # of separators up to each position, its own included
        before_window = torch.cat([torch.zeros(window_size, dtype=count.dtype), count])
        oldest = before_window[: len(ids)] - max_separators
        behind &= is_sink | (count[None, :] > oldest[:, None])
    return in_window | behind


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    logits_soft_cap: float = 0.0,
) -> torch.Tensor:
    """Attention over an explicit mask, in float32, one query at a time.

    Args:
        query: ``[num_queries, num_heads, head_size]``.
        key: ``[num_keys, num_kv_heads, head_size]``.
        value: ``[num_keys, num_kv_heads, head_size]``.
        mask: ``[num_queries, num_keys]`` bool; every row sees at least one key.
        scale: factor on the logits.
        logits_soft_cap: cap ``c`` of ``c * tanh(logits / c)``; 0 is none.

    Returns:
        ``[num_queries, num_heads, head_size]`` float32.
    """
    group = query.shape[1] // key.shape[1]
    keys = key.float().repeat_interleave(group, dim=1)
    values = value.float().repeat_interleave(group, dim=1)
    output = torch.empty(query.shape, dtype=torch.float32)
    for row in range(query.shape[0]):
        seen = mask[row]
        logits = torch.einsum("hd,khd->hk", query[row].float(), keys[seen]) * scale
        if logits_soft_cap:
            logits = logits_soft_cap * torch.tanh(logits / logits_soft_cap)
        output[row] = torch.einsum("hk,khd->hd", logits.softmax(-1), values[seen])
    return output


@torch.no_grad()
def masked_logits(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    mask: torch.Tensor,
    dense_layers: Sequence[int] = (),
) -> torch.Tensor:
    """Logits of a Hugging Face model under an explicit mask.

    A long sequence goes through in pieces, so that attention weights of the whole are never
    held at once.

    Args:
        model: a causal language model; its dtype decides the arithmetic.
        token_ids: ``[num_tokens]``.
        mask: ``[num_tokens, num_tokens]`` bool.
        dense_layers: layers that see every earlier token instead.

    Returns:
        ``[num_tokens, vocab_size]`` in the model's dtype.
    """

    def bias(rows: torch.Tensor) -> torch.Tensor:
        added = torch.zeros(rows.shape, dtype=model.dtype)
        return added.masked_fill_(~rows, float("-inf"))[None, None]

    def see_everything(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        shape = kwargs["attention_mask"].shape[-2:]
        causal = torch.ones(shape, dtype=torch.bool).tril(shape[1] - shape[0])
        return args, {**kwargs, "attention_mask": bias(causal)}

    with ExitStack() as hooks:
        for index in dense_layers:
            attention: torch.nn.Module = model.model.layers[index].self_attn
            hook = attention.register_forward_pre_hook(see_everything, with_kwargs=True)
            hooks.callback(hook.remove)
        return _logits_in_pieces(model, token_ids, mask, bias)


def _logits_in_pieces(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    mask: torch.Tensor,
    bias: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    ids = torch.as_tensor([list(token_ids)])
    num_tokens = ids.shape[1]
    if num_tokens <= PIECE:
        logits: torch.Tensor = model(input_ids=ids, attention_mask=bias(mask)).logits[0]
        return logits
    pieces, cache = [], None
    for start in range(0, num_tokens, PIECE):
        stop = min(start + PIECE, num_tokens)
        output = model(
            input_ids=ids[:, start:stop],
            attention_mask=bias(mask[start:stop, :stop]),
            position_ids=torch.arange(start, stop)[None],
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        pieces.append(output.logits[0])
    return torch.cat(pieces)


def first_difference(
    model: PreTrainedModel,
    prompt: Sequence[int],
    generated: Sequence[int],
    separator_ids: Sequence[int],
    num_sink_tokens: int,
    window_size: int,
    dense_layers: Sequence[int] = (),
    max_separators: int | None = None,
    after: KeptAfter | None = None,
) -> str | None:
    """Where ``generated`` leaves the model's greedy continuation of ``prompt``.

    One forward pass over both suffices: as long as every token so far agrees, the reference's
    own greedy run would have produced the very same input.

    Returns:
        ``None`` when all tokens agree, else one sentence that names step, tokens and margin.

    Raises:
        ValueError: nothing was generated, so there is nothing that could differ.
    """
    if not generated:
        raise ValueError("nothing was generated: there is nothing to compare")
    token_ids = [*prompt, *generated]
    options = separator_ids, num_sink_tokens, window_size
    mask = sepllm_mask(token_ids, *options, max_separators=max_separators, after=after)
    logits = masked_logits(model, token_ids, mask, dense_layers)[len(prompt) - 1 : -1]
    for step, (row, token) in enumerate(zip(logits.float(), generated, strict=True)):
        best = int(row.argmax())
        if best != token:
            margin = float(row[best] - row[token])
            return f"step {step}: {token} instead of {best}, whose logit is {margin:.3g} higher"
    return None
