"""H2O against a trace by hand, a loop over dictionaries, and full attention."""

import math

import pytest
import torch
from small_models import ARCHITECTURES, make_ids, make_model

from vllm_sepllm.baselines.h2o import SHARES, HeavyHitters, apply_h2o

pytestmark = pytest.mark.training


def logits_of(probabilities):
    """Logits whose softmax over any of the keys is in proportion to these."""
    rows = torch.full((1, 8, 8), -torch.inf, dtype=torch.float64)
    for query, row in enumerate(probabilities):
        rows[0, query, : query + 1] = torch.tensor(row, dtype=torch.float64).log()
    return rows


def test_eight_tokens_by_hand():
    """Two heavy hitters and two recent keys. Every query gives its own key 1, the one before it 1,
    and older ones what stands here; rows are scaled to a sum of 1 over what is seen."""
    weights = [
        [1],
        [1, 1],
        [2, 1, 1],
        [1, 4, 1, 2],
        [1, 5, 9, 1, 1],
        [2, 2, 9, 2, 1, 1],
        [2, 2, 9, 9, 2, 1, 1],
        [4, 4, 9, 9, 9, 4, 1, 1],
    ]
    state = HeavyHitters(heavy=2, recent=2)
    found = state.attend(logits_of(weights), num_kv_heads=1)[0]
    seen = [(row > 0).nonzero().flatten().tolist() for row in found]
    # Scores before query 4: key 0 has 1 + 1/2 + 2/4 + 1/8, key 1 has 1/2 + 1/4 + 4/8, key 2 has
    # 1/4 + 1/8. So key 2 is dropped, and has no part in anything from there on. Query 4 gives key 0
    # 1/8 and key 1 5/8. Of keys 0, 1, 3 before query 5, key 3 has 1/4 + 1/8, and so on.
    assert seen[:4] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
    assert seen[4:] == [[0, 1, 3, 4], [0, 1, 4, 5], [0, 1, 5, 6], [0, 1, 6, 7]]
    assert found[4, [0, 1, 3, 4]].tolist() == pytest.approx([1 / 8, 5 / 8, 1 / 8, 1 / 8])
    assert state.scores[0, 0].item() == pytest.approx(2.125 + 1 / 8 + 2 / 6 + 2 / 6 + 4 / 10)


def by_dictionaries(logits, heavy, recent, prompt, as_published=False):
    """One head: what is held is a dictionary of scores."""
    held, rows = {}, []
    for i in range(logits.shape[-1]):
        held[i] = 0.0
        last = i - recent - as_published
        if i >= prompt and (not as_published or i > heavy + recent):
            older = sorted((k for k in held if k <= last), key=lambda k: -held[k])
            for key in older[heavy:]:
                del held[key]
        skips = as_published and i >= prompt and i > heavy + recent
        exp = {k: math.exp(logits[i, k]) for k in held if not (skips and k == i - recent)}
        total = sum(exp.values())
        row = [0.0] * logits.shape[-1]
        for key, value in exp.items():
            row[key] = value / total
            held[key] += value / total
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("as_published", [False, True])
@pytest.mark.parametrize(
    ("heavy", "recent", "prompt"), [(3, 4, 0), (0, 5, 0), (6, 1, 20), (4, 7, 9)]
)
def test_it_is_what_dictionaries_hold(heavy, recent, prompt, as_published):
    """In one piece, and in pieces as a prompt and its answer come."""
    torch.manual_seed(heavy)
    logits = torch.randn(2, 40, 40, dtype=torch.float64)
    logits += 2 * torch.randn(2, 1, 40, dtype=torch.float64)
    expected = torch.stack(
        [by_dictionaries(x, heavy, recent, prompt, as_published) for x in logits]
    )
    state = HeavyHitters(heavy, recent, prompt, "query_head", as_published)
    found = state.attend(logits.clone(), num_kv_heads=2)
    assert torch.allclose(found, expected, atol=1e-12)
    most = heavy + recent + as_published  # one too many for a step
    assert ((found > 0).sum(-1)[:, max(prompt, 1) :] <= most).all()
    state = HeavyHitters(heavy, recent, prompt, "query_head", as_published)
    parts = [state.attend(logits[:, a:b, :b], 2) for a, b in ((0, 25), (25, 39), (39, 40))]
    for part, (a, b) in zip(parts, ((0, 25), (25, 39), (39, 40)), strict=True):
        assert torch.equal(part, found[:, a:b, :b])


@pytest.mark.parametrize("share", SHARES)
def test_shared_sets(share):
    """Heads of a set see the same keys: those of the sum of their scores."""
    torch.manual_seed(0)
    logits = torch.randn(4, 30, 30, dtype=torch.float64)
    logits += 4 * torch.randn(4, 1, 30, dtype=torch.float64)  # each head has keys of its own
    state = HeavyHitters(3, 4, 0, share)
    seen = state.attend(logits, num_kv_heads=2) > 0
    same = {"query_head": [], "kv_head": [(0, 1), (2, 3)], "layer": [(0, 1), (1, 2), (2, 3)]}[share]
    for a, b in ((0, 1), (1, 2), (2, 3)):
        assert torch.equal(seen[a], seen[b]) == ((a, b) in same)


@pytest.fixture(params=ARCHITECTURES)
def model(request):
    return make_model(request.param)


def test_a_budget_over_everything_is_full_attention(model):
    ids = torch.arange(5, 45)[None] % model.config.vocab_size
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        apply_h2o(model, heavy=20, recent=20)
        assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-10)
        apply_h2o(model, heavy=3, recent=4)
        assert not torch.allclose(model(input_ids=ids).logits, expected, atol=1e-3)


def test_generation_is_what_whole_texts_give(model):
    """With a cache, as answers are generated, and without."""
    apply_h2o(model, heavy=3, recent=5, prompt=12)
    ids = torch.arange(7, 27)[None] % model.config.vocab_size
    found = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        logits = model(input_ids=found, use_cache=False).logits
    assert logits[0, 19:-1].argmax(-1).tolist() == found[0, 20:].tolist()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"heavy": -1, "recent": 4}, "heavy=-1"),
        ({"heavy": 1, "recent": 0}, "recent=0"),
        ({"heavy": 1, "recent": 1, "share": "block"}, "share='block': must be one of query_head"),
    ],
)
def test_refused(model, arguments, part):
    with pytest.raises(ValueError, match=part):
        apply_h2o(model, **arguments)


def test_one_text_at_a_time(model):
    apply_h2o(model, heavy=1, recent=1)
    with pytest.raises(ValueError, match="a batch of 2 texts"):
        model(input_ids=torch.ones(2, 4, dtype=torch.long))
    state = HeavyHitters(1, 1)
    with pytest.raises(ValueError, match="2 tokens after 3, but 0 were seen"):
        state.attend(torch.zeros(1, 2, 5), 1)


def test_a_window_of_the_models_own_is_refused():
    model = make_model("Mistral", sliding_window=8)
    apply_h2o(model, heavy=1, recent=1)
    with pytest.raises(ValueError, match="sliding_window=8: this baseline has plain causal"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long))


def test_what_would_be_left_out_is_refused():
    model = make_model(attention_dropout=0.1)
    apply_h2o(model, heavy=4, recent=8)
    ids = torch.tensor(make_ids(20))
    padding = torch.ones_like(ids)
    padding[0, :3] = 0
    with pytest.raises(ValueError, match="attend to padding"):
        model(input_ids=ids, attention_mask=padding)
    with pytest.raises(ValueError, match=r"dropout=0\.1: this baseline"):
        model.train()(input_ids=ids)
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    with pytest.raises(ValueError, match="layers of the types full_attention, sliding_attention"):
        apply_h2o(make_model("Qwen3", layer_types=kinds, sliding_window=8), heavy=4, recent=8)
