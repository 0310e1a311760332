"""H2O, the heavy-hitter oracle: :func:`apply_h2o`.

Zhang et al. (arXiv 2306.14048), algorithm 1: a key's score is the sum of the attention that it has
received so far. A query sees the most recent keys, and of those before them the ones with the
highest scores. What is dropped never comes back::

    score(k)   =  sum of p(q, k) over the queries q so far that saw k
    seen by i  =  { i - recent < k <= i }  and  the `heavy` highest scores of { k <= i - recent }
                  that are still held

Differences from the code that its authors published (FMInference/H2O, ``h2o_hf``):

* ``utils_lm_eval`` takes the scores of a whole text at once, so that later tokens decide what
  earlier ones see. Here they never do.
* ``utils_hh`` leaves a key out for one step when it leaves the recent ones, and drops nothing in
  the step in which there is one key too many. Here a key is a heavy hitter at once, or dropped.
  ``as_published`` does it their way.
* Both were written for models with as many KV heads as query heads. With fewer, a cache holds keys
  by KV head: ``share="kv_head"`` sums the scores of the query heads that share one.

Scores depend on every step before, so a prompt that is cut differently gives other results: no
prefix caching, and a preempted request does not come back as it was. It needs the probabilities
themselves, which fused attention kernels do not write.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_sepllm.baselines.common import attention_layers, install

NAME = "sepllm-h2o"
SHARES = ("query_head", "kv_head", "layer")


@dataclass
class HeavyHitters:
    """What one layer holds while a text goes on.

    Attributes:
        heavy: keys held for their scores.
        recent: most recent keys seen, the query's own included.
        prompt: first tokens of a text that see everything; nothing is dropped among them.
        share: which heads hold the same keys: those of a KV head, of a layer, or each its own.
        as_published: keys leave the recent ones as in the code that the authors published.
        scores: ``[sets, keys]``, attention received, per set of keys that are held together.
        held: ``[sets, keys]``.
    """

    heavy: int
    recent: int
    prompt: int = 0
    share: str = "kv_head"
    as_published: bool = False
    scores: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    held: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.bool))

    def attend(self, logits: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
        """Probabilities of new queries, which come in order.

        Args:
            logits: ``[heads, queries, keys]``, scaled. The last keys are those of the queries. As
                many queries as keys are the beginning of a text.
            num_kv_heads: of the model.

        Returns:
            As ``logits``, 0 for what is not seen.

        Raises:
            ValueError: the queries do not follow those before them.
        """
        num_heads, num_queries, num_keys = logits.shape
        sets = {"query_head": num_heads, "kv_head": num_kv_heads, "layer": 1}[self.share]
        before = num_keys - num_queries
        if before == 0:
            self.scores = logits.new_zeros(sets, 0)
            self.held = torch.zeros(sets, 0, dtype=torch.bool, device=logits.device)
        if self.held.shape != (sets, before):
            raise ValueError(
                f"{num_queries} tokens after {before}, but {self.held.shape[1]} were seen: H2O "
                "follows one text at a time, from its beginning on"
            )
        grown = logits.new_zeros(sets, num_queries)
        self.scores = torch.cat([self.scores, grown], 1)
        self.held = torch.cat([self.held, torch.ones_like(grown, dtype=torch.bool)], 1)
        probabilities = torch.zeros_like(logits)
        for query in range(num_queries):
            position = before + query
            if position >= self.prompt:
                self._drop(position)
            seen = self.held[:, : position + 1].clone()
            if self.as_published and position > max(self.heavy + self.recent, self.prompt - 1):
                seen[:, position - self.recent] = False
            seen = seen.repeat_interleave(num_heads // sets, 0)
            row = logits[:, query, : position + 1].masked_fill(~seen, -torch.inf).softmax(-1)
            probabilities[:, query, : position + 1] = row
            self.scores[:, : position + 1] += row.view(sets, -1, position + 1).sum(1)
        return probabilities

    def _drop(self, position: int) -> None:
        """Before the query at ``position``: of the older keys, only the heaviest stay."""
        older = position - self.recent + (not self.as_published)
        if older <= self.heavy:
            return
        scores = self.scores[:, :older].masked_fill(~self.held[:, :older], -torch.inf)
        stay = torch.zeros_like(self.held[:, :older])
        if self.heavy:
            stay.scatter_(1, scores.topk(self.heavy, 1).indices, True)
        self.held[:, :older] &= stay


def _attend(
    state: HeavyHitters,
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Of one text; see :data:`vllm_sepllm.baselines.common.Attend`."""
    del layer
    if query.shape[0] != 1:
        raise ValueError(f"a batch of {query.shape[0]} texts: H2O follows one text at a time")
    num_kv_heads, groups = key.shape[1], query.shape[1] // key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    keys, values = (x[0].repeat_interleave(groups, 0) for x in (key, value))
    logits = (query[0].to(wide) @ keys.to(wide).mT) * scaling
    probabilities = state.attend(logits, num_kv_heads)
    return (probabilities.to(value.dtype) @ values).transpose(0, 1)[None]


def apply_h2o(
    model: Any,
    heavy: int,
    recent: int,
    prompt: int = 0,
    share: str = "kv_head",
    as_published: bool = False,
) -> list[HeavyHitters]:
    """Make a Hugging Face decoder attend as H2O does, one text at a time.

    Args:
        model: a causal language model of Transformers.
        heavy: keys held for their scores; 0 leaves a window.
        recent: most recent keys, the query's own included.
        prompt: first tokens of each text that see everything.
        share: ``"query_head"`` as published, ``"kv_head"`` what a cache can hold, or ``"layer"``.
        as_published: see :class:`HeavyHitters`.

    Returns:
        What each layer holds.

    Raises:
        ValueError: a value is out of range, or the model has attention code of its own.
    """
    if heavy < 0 or recent < 1 or prompt < 0:
        raise ValueError(
            f"heavy={heavy}, recent={recent}, prompt={prompt}: heavy and prompt must be at least "
            "0, recent at least 1, the query's own key"
        )
    if share not in SHARES:
        raise ValueError(f"share={share!r}: must be one of {', '.join(SHARES)}")
    layers = attention_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no attention layers that can be replaced")
    states = [HeavyHitters(heavy, recent, prompt, share, as_published) for _ in layers]
    install(model, NAME, _attend, states)
    return states
