"""Drafts change nothing but the number of steps: the engine with right, wrong and half-right drafts against the naive
loop, and when drafts are made at all."""

from __future__ import annotations

import random

import naive
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from naive import engine, expected, prompts, request

from prairie.engine.constraint import Constraint
from prairie.engine.lookup import Lookup
from prairie.engine.speculation import KNOWN, MOST_DRAFTED, TRIAL, Pace, Speculation


class Forced(Speculation):
    """Drafts without asking what that costs: some tokens of the answer, `right` of them as they will be."""

    def __init__(self, answers: dict[str, list[int]], seed: int, right: float = 0.7) -> None:
        super().__init__()
        self.answers, self.right, self.rng = answers, right, random.Random(seed)

    def draft(self, sequences, room):
        for sequence in sequences:
            most = min(self.rng.randrange(7), room, sequence.max_length - len(sequence.ids) - 1)
            if sequence.lookup is None or most <= 0:
                continue
            answer = self.answers[sequence.request.id]
            at = sequence.generated
            draft = [*answer[at : at + most], *[5] * most][:most]
            sequence.draft = [t if self.rng.random() < self.right else self.rng.randrange(3, 200) for t in draft]
            room -= most


def drafting(answers, seed=0, right=0.7, **limits):
    """An engine whose drafts are forced."""
    subject = engine(speculate="ngram", **limits)
    subject.scheduler.speculation = subject.speculation = Forced(answers, seed, right)
    return subject


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 10**6), right=st.sampled_from((0.0, 0.6, 0.9, 1.0)), blocks=st.integers(12, 40),
    block_size=st.sampled_from((1, 4, 8)), max_batch=st.integers(1, 6), step_tokens=st.integers(1, 40),
    reuse=st.booleans(), compiles=st.booleans(), places=st.lists(st.integers(0, 23), min_size=1, max_size=6),
    cancelled=st.integers(0, 40),
)  # fmt: skip
def test_any_draft_leaves_the_answer(
    seed, right, blocks, block_size, max_batch, step_tokens, reuse, compiles, places, cancelled
):
    """Adapters, preemption, shared blocks, chunks, a request that is cancelled: blocks sum up after every step."""
    adapted = [place % 3 == 0 for place in places]
    wanted = {f"r{i}": list(expected(p, 12, 1 if adapted[i] else None)) for i, p in enumerate(places)}
    subject = drafting(
        wanted, seed, right, kv_tokens=8 * blocks, block_size=block_size, max_batch=max_batch,
        step_tokens=step_tokens, prefix_reuse=reuse, compiles=compiles,
    )  # fmt: skip
    assert subject.compile() == compiles
    subject.add_adapter("one", naive.adapter(1))
    for i, place in enumerate(places):
        if len(prompts()[place]) < subject.max_context:
            subject.add(request(f"r{i}", prompts()[place], "one" if adapted[i] else None, max_tokens=12))
    steps = 0
    while subject.has_work:
        for output in subject.step():
            if output.completion is not None:
                answer = wanted[output.request_id]
                room = subject.max_context - output.completion.prompt_tokens
                assert output.completion.token_ids == answer[:room]
        steps += 1
        if steps == cancelled:
            subject.cancel("r0")
        subject.cache.pool.check(subject._sequences.values())
        assert steps < 3000
    subject.cache.pool.check([])
    # What is known in the cache is right: the same requests again, from it.
    subject.speculation.right = 0
    asked = [
        request(f"r{i}", prompts()[p], "one" if adapted[i] else None, max_tokens=12)
        for i, p in enumerate(places)
        if len(prompts()[p]) < subject.max_context
    ]
    for again in subject.generate(asked):
        room = subject.max_context - again.prompt_tokens
        assert again.token_ids == wanted[again.request_id][:room]


@pytest.mark.parametrize("compiles", [False, True], ids=["torch", "compiled"])
def test_what_was_drafted_wrongly_is_not_shared(compiles):
    """A block is known only when it holds what was said: a prompt that goes on like the answer, and one that goes on
    like the wrong draft."""
    ids = prompts()[5]
    answer = naive.greedy(ids, 24, stops=False)
    subject = drafting({"r": answer}, seed=3, block_size=4, compiles=compiles)
    subject.compile()
    (first,) = subject.generate([request("r", ids, max_tokens=24, ignore_eos=True)])
    assert first.token_ids == answer and 0 < subject.speculation.accepted_tokens < subject.speculation.drafted_tokens
    subject.scheduler.speculation = subject.speculation = None
    longer = [*ids, *answer[:-1]]
    (again,) = subject.generate([request("again", longer, max_tokens=4, ignore_eos=True)])
    assert again.cached_tokens == (len(longer) - 1) // 4 * 4
    assert again.token_ids == naive.greedy(longer, 4, stops=False)


@pytest.mark.parametrize("compiles", [False, True], ids=["torch", "compiled"])
def test_seeds_draw_the_same_tokens_with_all_their_figures(compiles):
    kinds = [{}, {"top_k": 5, "logprobs": 2}, {"top_p": 0.8}, {"logit_bias": {9: 3.0}}, {"min_p": 0.1}, {"logprobs": 0}]
    asked = [
        request(f"r{i}", prompts()[i], temperature=1.2 if i % 4 else 0, seed=i, max_tokens=14, ignore_eos=True, **kind)
        for i, kind in enumerate(kinds * 2)
    ]
    plain = engine(compiles=compiles)
    plain.compile()
    wanted = plain.generate(asked)
    subject = drafting({a.request_id: a.token_ids for a in wanted}, seed=1, compiles=compiles)
    subject.compile()
    for ours, theirs in zip(subject.generate(asked), wanted, strict=True):
        assert ours.token_ids == theirs.token_ids and ours.text == theirs.text
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
        assert len(ours.top_logprobs) == len(theirs.top_logprobs)
        for mine, other in zip(ours.top_logprobs, theirs.top_logprobs, strict=True):
            assert [t for t, _ in mine] == [t for t, _ in other]
    assert subject.speculation.accepted_tokens > 20


def test_it_ends_where_it_would_end():
    """Stop strings and ids, the limit and streams, in the middle of a draft that was right."""
    ids = prompts()[7]
    (plain,) = engine().generate([request("r", ids, max_tokens=20, ignore_eos=True)])
    word = plain.text[5:9]
    for sampling in ({"stop": (word,)}, {"stop_ids": (plain.token_ids[9],)}, {"max_tokens": 11}):
        asked = request("r", ids, **{"max_tokens": 20, "ignore_eos": True} | sampling)
        (wanted,) = engine().generate([asked])
        subject = drafting({"r": plain.token_ids}, seed=2, right=1.0)
        subject.add(asked)
        heard, tokens = "", []
        while subject.has_work:
            for output in subject.step():
                heard, tokens = heard + output.text_delta, tokens + output.token_ids
                end = output.completion
        assert end.token_ids == wanted.token_ids == tokens and end.text == wanted.text == heard
        assert end.finish_reason == wanted.finish_reason and end.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)
        subject.cache.pool.check([])


def test_forms_and_penalties_are_never_drafted():
    """Each of their tokens depends on the one before in ways that a step does not compute."""
    kinds = [{"constraint": Constraint.regex("(ab){9}")}, {"frequency_penalty": 1.0}, {"presence_penalty": 1.0}]
    asked = [request(f"r{i}", prompts()[i], max_tokens=20, **kind) for i, kind in enumerate(kinds)]
    wanted = engine().generate(asked)
    subject = drafting({a.request_id: a.token_ids for a in wanted}, right=1.0)
    assert [a.token_ids for a in subject.generate(asked)] == [a.token_ids for a in wanted]
    assert subject.speculation.drafted_tokens == 0


def test_the_longest_match_that_stood_here_last_is_followed():
    lookup = Lookup()
    ids = [1, 2, 3, 4, 50, 9, 3, 4, 60, 8, 1, 2, 3]
    lookup.read(ids, len(ids))
    assert lookup.draft(ids, 3) == [4, 50, 9]
    ids.append(4)
    lookup.read(ids, 13)
    assert lookup.draft(ids, 2) == [50, 9], "three tokens in agreement are followed, not the later two"
    ids += [60]
    lookup.read(ids, 13)
    assert lookup.draft(ids, 2) == [8, 1], "after a miss the last tokens are looked up anew"
    again = Lookup()
    again.read([7, 5, 6, 5, 6], 5)
    assert again.draft([7, 5, 6, 5, 6], 5) == [5, 6, 5, 6, 5]


def test_a_line_through_the_times_of_steps():
    pace, rng = Pace(), random.Random(1)
    assert pace.line() == (0, 0)
    for _ in range(20):
        pace.learn(2, 0.007)
    base, each = pace.line()
    assert base + 2 * each == pytest.approx(0.007) and each == pytest.approx(0.15 * base, rel=0.3)
    for _ in range(300):
        tokens = rng.randrange(1, 17)
        pace.learn(tokens, 0.004 + 0.0008 * tokens + rng.gauss(0, 0.0003))
    assert pace.line() == pytest.approx((0.004, 0.0008), rel=0.15)


def sequence_of(ids, answer):
    """A sequence as the engine makes it, with an answer so far."""
    subject = engine(speculate="ngram", model=naive.model(context=400))
    subject.add(request("r", ids, max_tokens=200))
    (sequence,) = subject._sequences.values()
    sequence.ids += answer
    return sequence


def drafted(speculation, sequence, companions=1):
    speculation.draft([sequence] * companions, 1000)
    return len(sequence.draft)


def test_it_is_made_where_it_pays():
    """Copies are drafted, babble is not; a large batch has no time left over."""
    rng = random.Random(0)
    text = [rng.randrange(3, 200) for _ in range(100)]
    speculation = Speculation()
    for count in (1, 2, 4, 8) * 20:
        speculation.learn(1, count, 0.0045 + 0.00075 * count)
    copying = sequence_of(text, [])
    assert drafted(speculation, copying) == 0, "nothing was seen of it yet"
    copying.ids += text[:30]
    assert 8 <= drafted(speculation, copying) <= MOST_DRAFTED
    assert copying.draft == text[30 : 30 + len(copying.draft)]
    babbling = sequence_of(text, [rng.randrange(3, 200) for _ in range(40)])
    assert drafted(speculation, babbling) == 0
    crowd = Speculation()
    for count in (32, 34, 36) * 20:
        crowd.learn(32, count, 0.001 + 0.0009 * count)
    many = [sequence_of(text, text[:12]) for _ in range(32)]
    crowd.draft(many, 1000)
    assert sum(len(s.draft) for s in many) < 32
    copying.ids += [rng.randrange(3, 200) for _ in range(60)]
    assert drafted(speculation, copying) == 0
    copying.ids += text[40:70]
    assert drafted(speculation, copying) > 4, "it is found again"


def test_drafts_that_do_not_pay_are_tried_once_in_a_while():
    """A step with drafts takes ten times as long from its first draft on; a token more costs little in either way.
    Where that ends they are made again; a step that something else held up stops them for no longer than a trial."""
    rng, steps = random.Random(0), 8 * TRIAL
    text = [rng.randrange(3, 200) for _ in range(100)]
    batch = [sequence_of(text, text[:30]) for _ in range(8)]
    speculation = Speculation()

    def go(count, dearer):
        made = []
        for number in range(count):
            speculation.draft(batch, 1000)
            tokens = 8 + sum(len(sequence.draft) for sequence in batch)
            noise = rng.gauss(1, 0.05) * (40 if number == 50 else 1)
            speculation.learn(8, tokens, noise * (0.004 + 0.0001 * (tokens - 8) + (dearer if tokens > 8 else 0)))
            made.append(tokens > 8)
        return sum(made)

    assert KNOWN <= go(steps, 0.05) <= KNOWN + 4
    assert go(4 * steps, 0.0) > 2.5 * steps, "all but those of the trials"
    assert go(steps, 0.05) <= 20, "and stops soon"
    speculation.draft([sequence_of(text, text[:30])], 1000)
    assert 1 not in speculation._paces or not speculation._paces[1][1].seen, "another batch has figures of its own"


def test_the_whole_engine_drafts_a_loop():
    """Small random models end in circles, which are drafted once they are seen; the answers stay."""
    asked = [request(f"r{i}", ids, max_tokens=60, ignore_eos=True) for i, ids in enumerate(prompts()[:6])]
    wanted = [a.token_ids for a in engine(model=naive.model(3)).generate(asked)]
    subject = engine(model=naive.model(3), speculate="ngram", max_batch=1)
    assert [a.token_ids for a in subject.generate(asked)] == wanted
    figures = subject.figures()
    assert figures["generated_tokens"] == sum(map(len, wanted))
    assert 0 <= figures["accepted_tokens"] <= figures["drafted_tokens"]
