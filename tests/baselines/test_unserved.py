"""H2O and PoD on the material of an evaluation: beside a model's own generation, and by hand."""

import pytest
import torch
from helpers import MODEL
from transformers import AutoModelForCausalLM

from vllm_sepllm.evaluation.material import NEW_TOKENS, Suite, make_material, package_text
from vllm_sepllm.evaluation.unserved import answer_questions, apply, score_texts
from vllm_sepllm.evaluation.ways import FACTS, H2O, POD, SEPLLM, make_ways, unserved_ways

pytestmark = pytest.mark.unit

SMALL = Suite(1, 300, (450,), 1, 1)
LAYERS = 6
ALL = 10_000
EVERYTHING = [
    {"method": "h2o", "heavy": 0, "recent": ALL},
    {"method": "h2o", "heavy": ALL, "recent": 1},
    {"method": "pod", "num_sink_tokens": 0, "recent": ALL},
]


@pytest.fixture(scope="module")
def material(tokenizer):
    return make_material(tokenizer, [package_text()], SMALL)


def load():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.mark.parametrize("options", EVERYTHING)
def test_with_room_for_everything_it_is_full_attention(material, tokenizer, options):
    plain = load()
    [text] = material.texts
    asked = [*material.questions[:2], *material.questions[9:11]]
    with torch.inference_mode():
        logits = plain(torch.tensor([text])).logits[0, 149:-1]
        expected = torch.nn.functional.cross_entropy(
            logits, torch.tensor(text[150:]), reduction="none"
        )
        said = []
        for question in asked:
            ids = torch.tensor([question.token_ids])
            new = plain.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1] :]
            ids = new.tolist()
            end = tokenizer.eos_token_id
            said.append(tokenizer.decode(ids[: ids.index(end)] if end in ids else ids))
    method = apply(load(), options, material.texts)
    done = []
    found = score_texts(method, material.texts, lambda: done.append(0))
    assert found["nats"][0] == pytest.approx(expected.tolist(), abs=1e-4)
    assert found["likeliest"][0] == logits.argmax(-1).tolist()
    assert found["held"] == {"requests": 1, "pages": 10, "of": 10}
    answers = answer_questions(method, tokenizer, asked, lambda: done.append(0))
    assert answers["replies"] == said
    assert answers["held"]["requests"] == 2
    assert len(done) == 5


def test_questions_do_not_see_each_other(material, tokenizer):
    """H2O's scores are those of the document again before each question."""
    method = apply(load(), {"method": "h2o", "heavy": 30, "recent": 30}, material.texts)
    asked = material.questions[:4]
    together = answer_questions(method, tokenizer, asked, lambda: None)["replies"]
    alone = [
        answer_questions(method, tokenizer, [one], lambda: None)["replies"][0] for one in asked
    ]
    assert together == alone
    assert len(set(together)) > 1


def test_a_whole_prompt_is_full_attention(material, tokenizer):
    """Nothing is dropped before its last token; then as much as without it."""
    budget = {"method": "h2o", "heavy": 30, "recent": 30}
    first, everything = budget | {"after_prompt": True}, EVERYTHING[0]
    logits = {}
    for name, options in (("first", first), ("everything", everything), ("never", budget)):
        method = apply(load(), options, material.texts)
        found = score_texts(method, material.texts, lambda: None)
        logits[name] = found["nats"][0]
        if name == "first":
            assert found["held"] == {"requests": 1, "pages": 2, "of": 10}
            assert [state.held.sum(1).unique().tolist() for state in method.states] == [[60]] * 6
    # The first predicted token follows from the prompt, the next one is behind it.
    assert logits["first"][0] == logits["everything"][0] != logits["never"][0]
    assert logits["first"][-1] != logits["everything"][-1]
    method = apply(load(), first, material.texts)
    asked = material.questions[:2]
    answer_questions(method, tokenizer, asked, lambda: None)
    [same] = {state.prompt for state in method.states}
    one, other = (question.token_ids for question in asked)
    assert one[:same] == other[:same], "the document is the prompt"
    assert one[same] != other[same]


def test_what_is_held(material):
    h2o = apply(load(), {"method": "h2o", "heavy": 30, "recent": 40}, material.texts)
    assert [h2o.held(length) for length in (20, 70, 500)] == [20, 70, 70]
    held = score_texts(h2o, material.texts, lambda: None)["held"]
    assert held == {"requests": 1, "pages": 3, "of": 10}, "70 of 300 tokens in pages of 32"
    pod = apply(load(), {"method": "pod", "num_sink_tokens": 4, "recent": 60}, material.texts)
    saved = pod.states[0].saved
    assert 0 < saved < 0.5
    assert [pod.held(n) for n in (64, 164)] == [64, pytest.approx(164 - 100 * saved)]


def test_budgets_are_those_of_streaming(material, tokenizer):
    options = {SEPLLM: {"window_size": 64}, FACTS: {"preset": "facts", "window_size": 64}}
    ways = make_ways(options, material, tokenizer, LAYERS)
    found = unserved_ways([H2O, POD], ways, 64)
    assert [way.name for way in found] == [
        "H2O, KV of SepLLM",
        "H2O, the document in full, KV of SepLLM",
        "H2O, KV of facts",
        "H2O, the document in full, KV of facts",
        "PoD, untrained",
    ]
    by_name = {way.name: way for way in ways}
    for way in found[:4]:
        equal = by_name[way.equal]
        for group, of in way.of_groups.items():
            size = equal.of_groups[group]["window_size"] + equal.of_groups[group]["num_sink_tokens"]
            assert of["heavy"] + of["recent"] == size
            assert abs(of["heavy"] - of["recent"]) <= 1
        shares = [one.ideal(material, tokenizer, LAYERS) for one in (way, equal)]
        assert shares[0] == pytest.approx(shares[1])
    assert found[4].ideal(material, tokenizer, LAYERS)["texts"] == 1
    assert not unserved_ways([], ways, 64)
    assert unserved_ways([POD], ways[:1], 64)[0].of_groups.keys() == material.groups.keys()
