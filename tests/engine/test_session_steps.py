"""Sessions that are sent turn after turn: with drafts, and preempted in steps ahead of outcomes."""

import pytest
from simulation import Simulation
from test_scheduling import DRAFTS, SEPARATORS, STEMS, WORDS, answer, next_token

pytestmark = pytest.mark.engine


def make(**options):
    """A simulation with a window and pages of 16 tokens, and steps of 64."""
    sepllm = {"window_size": 16, "separator_token_ids": list(SEPARATORS)}
    given = {"block_size": 16, "max_num_batched_tokens": 64, **options}
    return Simulation(sepllm, next_token, **given)


def right(name, tokens):
    """Drafts that are all accepted."""
    return answer(tokens, DRAFTS)


def expected(prompts, max_tokens):
    """Answers of a session's turns: the last token of a turn is dropped when the next one comes."""
    text, answers = [], []
    for prompt in prompts:
        text = text + prompt
        answers += answer(text, max_tokens)
        text = text + answer(text, max_tokens)[:-1]
    return answers


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 5, 6, 7])
def test_a_turn_that_stops_inside_accepted_drafts(asynchronous, max_tokens):
    """Wherever it stops: the next turn, and others that find its pages, read what they should."""
    simulation = make(
        num_blocks=200,
        propose=right,
        asynchronous=asynchronous,
        speculative_config={
            "method": "ngram",
            "num_speculative_tokens": DRAFTS,
            "prompt_lookup_max": 3,
        },
    )
    prompts = [STEMS[0][:40], WORDS[:3], [SEPARATORS[0]] * 2, STEMS[1][:30], WORDS[:1]]
    simulation.add("session", prompts[0], max_tokens, resumable=True)
    for prompt in [*prompts[1:], None]:
        simulation.turn("session", prompt, max_tokens)
    simulation.settle()
    simulation.check()
    assert simulation.answers["session"] == expected(prompts, max_tokens)
    text = []
    for prompt in prompts:  # the same text again, all at once
        text = text + prompt + answer(text + prompt, max_tokens)[:-1]
    simulation.add("again", text, 3)
    simulation.settle()
    assert simulation.answers["again"] == answer(text, 3)
    assert simulation.num_held == 0


@pytest.mark.parametrize("num_blocks", range(21, 40, 2))
def test_sessions_that_are_preempted_with_output_on_its_way(num_blocks):
    """Of two sessions and a long request none waits for ever, and none forgets its text."""
    simulation = make(
        num_blocks=num_blocks,
        asynchronous=True,
        scheduling_policy="priority",
        scheduler_reserve_full_isl=False,
    )
    prompts = {
        name: [[SEPARATORS[i]] * 60, WORDS[:5], STEMS[i][:20]] for i, name in enumerate("ab")
    }
    for name, turns in prompts.items():
        simulation.add(name, turns[0], 9, resumable=True, priority=5)
        for prompt in [*turns[1:], None]:
            simulation.turn(name, prompt, 9)
    for number in range(8):
        for _ in range(3):
            simulation.step()
            simulation.check()
        simulation.add(
            f"r{number}", [SEPARATORS[number % 2]] * (130 + number), 3, priority=number % 7
        )
    for _ in range(400):
        if simulation.live:
            simulation.step()
            simulation.check()
    assert not simulation.live, "somebody waits for ever"
    for name, turns in prompts.items():
        assert simulation.answers[name] == expected(turns, 9)
    assert simulation.num_held == 0


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("waits", [False, True])
def test_a_session_that_grows_to_the_models_length(asynchronous, waits):
    """It ends with its reason, whether the turn that is too much waits already or comes later, and
    others go on."""
    simulation = make(
        num_blocks=200,
        max_model_len=192,
        asynchronous=asynchronous,
        max_num_seqs=2,
    )
    first, more, others = STEMS[0][:100], STEMS[1][:88], STEMS[1][:70]
    lasting = STEMS[0][60:120]
    simulation.add("long", lasting, 60)
    simulation.add("session", first, 5, resumable=True)
    if not waits:
        for _ in range(12):
            simulation.step()
    simulation.turn("session", more, 5)  # 100 + 4 + 88 = 192
    simulation.add("others", others, 7)
    simulation.settle()
    assert simulation.answers["long"] == answer(lasting, 60)
    assert simulation.answers["session"] == answer(first, 5)
    assert simulation.finished["session"] == "error"
    assert "192 tokens of this session leave no room" in simulation.reasons["session"]
    assert simulation.answers["others"] == answer(others, 7)
    assert simulation.num_held == 0
