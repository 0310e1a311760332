import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sepllm.oracle.dense_mask import first_difference, masked_attention, sepllm_mask

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("length", [0, 1, 2, 17, 40])
@pytest.mark.parametrize("sinks", [0, 1, 4, 99])
@pytest.mark.parametrize("window", [1, 5, 99])
@pytest.mark.parametrize("separators", [[], [3], [0, 7]])
def test_mask_is_the_definition(length, sinks, window, separators):
    ids = torch.randint(0, 8, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    mask = sepllm_mask(ids, separators, sinks, window)
    assert mask.shape == (length, length)
    assert mask.dtype == torch.bool
    for query in range(length):
        for key in range(length):
            near = query - window < key
            expected = key <= query and (key < sinks or ids[key] in separators or near)
            assert bool(mask[query, key]) is expected, (query, key)


def test_window_over_everything_is_dense():
    ids = list(range(20))
    assert torch.equal(sepllm_mask(ids, [], 0, 20), torch.ones(20, 20).tril().bool())


def test_no_separators_is_sinks_and_window():
    mask = sepllm_mask([1] * 9, [], 2, 3)
    assert mask[8].nonzero().flatten().tolist() == [0, 1, 6, 7, 8]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("soft_cap", [0.0, 1.5])
def test_masked_attention_is_torchs(heads, soft_cap):
    num_heads, num_kv_heads = heads
    rng = torch.Generator().manual_seed(1)
    length, size, scale = 24, 16, 0.3
    query = torch.randn(length, num_heads, size, generator=rng)
    key, value = torch.randn(2, length, num_kv_heads, size, generator=rng)
    ids = torch.randint(0, 6, (length,), generator=rng).tolist()
    mask = sepllm_mask(ids, [2], 1, 4)
    out = masked_attention(query, key, value, mask, scale, soft_cap)

    group = num_heads // num_kv_heads
    q, k, v = (x.transpose(0, 1).double() for x in (query, key, value))
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    if soft_cap:
        capped = soft_cap * torch.tanh(q @ k.mT * scale / soft_cap)
        expected = capped.masked_fill(~mask, float("-inf")).softmax(-1) @ v
    else:
        expected = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale
        )
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected.transpose(0, 1), rtol=1e-5, atol=1e-5)


def test_masked_attention_reads_visible_keys_only():
    query = torch.randn(3, 1, 8)
    key, value = torch.randn(3, 1, 8), torch.randn(3, 1, 8)
    mask = torch.tensor([[1, 0, 0], [1, 0, 0], [1, 0, 1]]).bool()
    expected = masked_attention(query, key, value, mask, 1.0)
    key[1], value[1] = float("nan"), float("nan")
    assert torch.equal(masked_attention(query, key, value, mask, 1.0), expected)
    assert torch.equal(expected[0], expected[1])  # one visible key: its value, whatever the query
    assert torch.equal(expected[0], value[0])


class CountingModel:
    """Predicts the sum of what the last token sees, modulo the vocabulary."""

    dtype = torch.float32

    def __call__(self, input_ids, attention_mask):
        seen = attention_mask[0, 0] == 0
        totals = (seen * input_ids[0]).sum(-1) % 8
        logits = torch.nn.functional.one_hot(totals, 8).float()
        return type("Output", (), {"logits": logits[None]})()

    @classmethod
    def greedy(cls, prompt, steps):
        """Sinks 1, window 2, separator 3."""
        ids = list(prompt)
        for _ in range(steps):
            last = len(ids) - 1
            ids.append(sum(t for p, t in enumerate(ids) if p == 0 or t == 3 or p > last - 2) % 8)
        return ids[len(prompt) :]


def test_first_difference_is_none_for_the_models_own_tokens():
    prompt = [5, 3, 1, 4, 2]
    generated = CountingModel.greedy(prompt, 12)
    assert first_difference(CountingModel(), prompt, generated, [3], 1, 2) is None


@pytest.mark.parametrize("step", [0, 5, 11])
def test_first_difference_names_the_step(step):
    prompt = [5, 3, 1, 4, 2]
    generated = CountingModel.greedy(prompt, 12)
    right = generated[step]
    generated[step] = (right + 1) % 8
    found = first_difference(CountingModel(), prompt, generated, [3], 1, 2)
    assert found is not None
    assert found.startswith(f"step {step}: {(right + 1) % 8} instead of {right}")


def test_first_difference_sees_a_wrong_mask():
    prompt = [5, 3, 1, 4, 2, 6, 7]
    generated = CountingModel.greedy(prompt, 12)
    assert first_difference(CountingModel(), prompt, generated, [], 1, 2) is not None
    assert first_difference(CountingModel(), prompt, generated, [3], 0, 2) is not None
    assert first_difference(CountingModel(), prompt, generated, [3], 1, 3) is not None


@given(
    ids=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    sinks=st.integers(0, 6),
    window=st.integers(1, 70),
    bound=st.integers(1, 12),
)
@settings(max_examples=100, deadline=None)
def test_mask_with_a_bound_on_separators(ids, sinks, window, bound):
    """Row by row: window, sinks, and the last separators of what is left."""
    mask = sepllm_mask(ids, [2], sinks, window, max_separators=bound)
    for query in range(len(ids)):
        behind = range(max(0, query - window + 1))
        older = [k for k in behind if k >= sinks and ids[k] == 2][-bound:]
        seen = {*range(len(behind), query + 1), *older, *(k for k in behind if k < sinks)}
        assert set(mask[query].nonzero()[:, 0].tolist()) == seen
