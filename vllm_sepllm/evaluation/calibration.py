"""Which tokens are attended to from far: a list of what to keep that is measured, not thought of.

A key is far from a query if it is outside the query's window and no sink. For each token id::

    worth(id) = (received(id) + prior * worth(class)) / (pairs(id) + prior)

``received`` adds up the attention that the id's keys get from far queries, over heads, layers and
texts. ``pairs`` counts these queries and keys. A token seen once says little about its id, so each
is drawn towards its class as if ``PRIOR`` average tokens of the class had been seen as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

PRIOR = 2  # average tokens of its class
OTHER = "other"
MOST_IDS = 2000  # of a list
_BATCH = 256  # queries at a time


@dataclass(frozen=True)
class Received:
    """What token ids received from far. All arrays are ``[vocabulary]``, float64.

    Attributes:
        attention: sum of probabilities, mean over heads and layers.
        pairs: of a far query and a key.
        counts: how often the id was seen.
    """

    attention: npt.NDArray[np.float64]
    pairs: npt.NDArray[np.float64]
    counts: npt.NDArray[np.float64]


def received_from_far(
    model: Any, texts: Sequence[Sequence[int]], vocab_size: int, num_sinks: int, window: int
) -> Received:
    """Run texts through a Hugging Face model with full attention, and look.

    Args:
        model: a causal language model of Transformers, whose attention is replaced.
        texts: token ids of each, longer than the window.
        vocab_size: ids are below it.
        num_sinks: first tokens, which stay anyway.
        window: most recent tokens, the query's own included.

    Raises:
        ValueError: the model's attention cannot be replaced.
    """
    import torch

    from vllm_sepllm.baselines.common import attention_layers, install

    def attend(
        total: torch.Tensor,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        del layer
        groups, length = query.shape[1] // key.shape[1], key.shape[2]
        keys, values = (x.repeat_interleave(groups, 1) for x in (key, value))
        places = torch.arange(length, device=query.device)
        found = []
        for start in range(0, length, _BATCH):
            at = places[start : start + _BATCH, None]
            logits = torch.matmul(query[:, :, start : start + _BATCH], keys.mT) * scaling
            logits = logits.masked_fill(places > at, -torch.inf)
            probabilities = logits.softmax(-1, dtype=torch.float32)
            far = (places >= num_sinks) & (places <= at - window)
            total[:length] += (probabilities * far).sum(2).mean((0, 1)).double().cpu()
            found.append(torch.matmul(probabilities.to(value.dtype), values))
        return torch.cat(found, 2).transpose(1, 2)

    layers = attention_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no attention layers that can be replaced")
    longest = max(map(len, texts))
    total = torch.zeros(longest, dtype=torch.float64)
    install(model, "sepllm-far", attend, [total] * len(layers))
    attention, pairs, counts = (np.zeros(vocab_size) for _ in range(3))
    with torch.inference_mode():
        for text in texts:
            total.zero_()
            ids = np.asarray(text)
            model(input_ids=torch.tensor(ids[None], device=model.device), use_cache=False)
            seen_by = np.maximum(0, len(ids) - window - np.arange(len(ids)))
            seen_by[:num_sinks] = 0
            np.add.at(attention, ids, total[: len(ids)].numpy() / len(layers))
            np.add.at(pairs, ids, seen_by)
            np.add.at(counts, ids, seen_by > 0)
    return Received(attention, pairs, counts)


def worths(found: Received, classes: Mapping[str, Sequence[int]]) -> tuple[Any, dict[str, float]]:
    """Attention per pair of each id, drawn towards its class, and of each class.

    Args:
        found: of :func:`received_from_far`.
        classes: ids by class; an id is of the first class that has it, or of ``OTHER``.

    Returns:
        ``[vocabulary]``, and a number for each class that was seen.
    """
    names = [*classes, OTHER]
    of = np.full(len(found.pairs), len(classes))
    for number, ids in reversed(list(enumerate(classes.values()))):
        of[[i for i in ids if i < len(of)]] = number
    result = np.zeros(len(found.pairs))
    means = {}
    for number, name in enumerate(names):
        mine = of == number
        pairs, count = found.pairs[mine].sum(), found.counts[mine].sum()
        if not count:
            continue
        means[name] = found.attention[mine].sum() / pairs
        prior = PRIOR * pairs / count
        result[mine] = (found.attention[mine] + prior * means[name]) / (found.pairs[mine] + prior)
    return result, means


def keep_list(
    found: Received, classes: Mapping[str, Sequence[int]], share: float
) -> tuple[float, list[str | int]]:
    """Items of ``keep``: the ids of the greatest worth that make up a share of the tokens seen.

    A class that is worth as much is named whole, for those of its ids that were not seen.

    Args:
        found: of :func:`received_from_far`.
        classes: see :func:`worths`; their names are those of ``KEEP_CLASSES``.
        share: of all tokens.

    Returns:
        The share of tokens that the items make up, which classes can make larger, and the items.
    """
    worth, means = worths(found, classes)
    seen = np.flatnonzero(found.counts)
    order = seen[np.argsort(-worth[seen], kind="stable")]
    sums = found.counts[order].cumsum()
    chosen = order[sums <= share * sums[-1]][:MOST_IDS]
    if not len(chosen):
        return 0.0, []
    least = worth[chosen[-1]]
    named = [name for name, mean in means.items() if name != OTHER and mean >= least]
    within = {i for name in named for i in classes[name]}
    kept = {*map(int, chosen), *(i for i in within if i < len(found.counts))}
    mine = float(found.counts[sorted(kept)].sum() / found.counts.sum())
    return mine, [*named, *sorted(int(i) for i in chosen if int(i) not in within)]
