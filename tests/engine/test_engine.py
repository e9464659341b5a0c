"""The engine against the naive loop: batching, paging, chunks, preemption, prefix reuse and adapters change nothing."""

import random

import naive
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from naive import engine, expected, prompts, request

from prairie.engine.request import Request, SamplingParams
from prairie.errors import AdapterError, ContextLengthError, ModelError, RequestError

LENGTHS = (1, 3, 9, 17, 24)


@pytest.mark.parametrize("hot", [True, False], ids=["hot", "gathered"])
@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"max_batch": 1},
        {"max_batch": 24},
        {"prefix_reuse": False},
        {"step_tokens": 8, "max_batch": 4},
        {"kv_tokens": 96, "block_size": 4},
        {"kv_tokens": 112, "block_size": 8, "step_tokens": 16, "max_batch": 16},
        {"kv_tokens": 96, "block_size": 1, "prefix_reuse": False},
    ],
    ids=str,
)
def test_greedy_equals_the_naive_loop(limits, hot):
    subject = engine(**limits)
    if not hot:
        subject.cache.hot.most = 0
    asked = [request(f"r{i}", ids, max_tokens=LENGTHS[i % 5]) for i, ids in enumerate(prompts())]
    answers = subject.generate(asked)
    for i, answer in enumerate(answers):
        assert tuple(answer.token_ids) == expected(i, LENGTHS[i % 5]), i
        assert answer.finish_reason == ("stop" if answer.token_ids[-1] in naive.template().stop_ids else "length")
    assert (subject.scheduler.preemptions > 0) == ("kv_tokens" in limits)
    assert subject.cache.reuse == any(answer.cached_tokens for answer in answers)
    subject.cache.pool.check([])
    assert subject.cache.pool.available == subject.cache.pool.blocks


def test_a_second_round_answers_from_the_cache():
    subject = engine()
    asked = [request(f"r{i}", ids, max_tokens=5) for i, ids in enumerate(prompts())]
    first, second = subject.generate(asked), subject.generate(asked)
    assert [a.token_ids for a in first] == [a.token_ids for a in second]
    for ids, answer in zip(prompts(), second, strict=True):
        assert answer.cached_tokens == (len(ids) - 1) // 16 * 16


def test_one_step_shares_what_it_computes_itself():
    """Equal prompts that arrive together are computed once."""
    subject = engine()
    ids = prompts()[5] + prompts()[4] + [7]
    answers = subject.generate([request(f"r{i}", ids, max_tokens=4) for i in range(8)])
    assert [a.cached_tokens for a in answers] == [0] + [(len(ids) - 1) // 16 * 16] * 7
    assert {tuple(a.token_ids) for a in answers} == {tuple(naive.greedy(ids, 4))}


@pytest.mark.parametrize("compiles", [False, True], ids=["torch", "compiled"])
def test_one_token_left_beside_the_one_who_computes_the_rest(compiles):
    """The second of two equal prompts finds all blocks of the first and brings a single token: it must not look at
    them before they are written, and what an earlier sequence left in them must not be seen."""
    subject = engine(compiles=compiles, max_batch=4)
    assert subject.compile() == compiles
    other = [(7 * i) % 200 + 3 for i in range(60)]
    subject.generate([request(f"o{i}", [i + 3, *other], max_tokens=20, ignore_eos=True) for i in range(8)])
    for length in (17, 33):
        ids = [(5 * i + length) % 200 + 3 for i in range(length)]
        answers = subject.generate([request(f"r{i}", ids, max_tokens=6, ignore_eos=True) for i in range(3)])
        assert [a.cached_tokens for a in answers] == [0, length - 1, length - 1]
        assert {tuple(a.token_ids) for a in answers} == {tuple(naive.greedy(ids, 6, stops=False))}


@pytest.mark.parametrize("limits", [{}, {"kv_tokens": 112, "block_size": 8}, {"step_tokens": 8}], ids=str)
def test_adapters_mixed_in_one_batch(limits):
    subject = engine(**limits)
    for seed in (1, 2):
        subject.add_adapter(f"hash{seed}", naive.adapter(seed))
    which = [None, 1, 2, 1, None, 2] * 4
    asked = [
        request(f"r{i}", ids, adapter=f"hash{w}" if w else None, max_tokens=6)
        for i, (ids, w) in enumerate(zip(prompts(), which, strict=True))
    ]
    for i, answer in enumerate(subject.generate(asked)):
        assert tuple(answer.token_ids) == expected(i, 6, which[i]), i
    assert any(expected(i, 6, 1) != expected(i, 6) for i in range(24)), "the adapters do nothing"


def test_a_cache_is_not_reused_for_another_adapter_base_or_tenant():
    subject = engine()
    ids = prompts()[1] + prompts()[3]
    subject.add_adapter("old", naive.adapter(1))

    def cached(adapter=None, salt=""):
        (answer,) = subject.generate([request("r", ids, adapter=adapter, salt=salt, max_tokens=3)])
        lora = {"old": naive.adapter(1), "new": naive.adapter(2)}.get(adapter)
        assert answer.token_ids == naive.greedy(ids, 3, lora)
        return answer.cached_tokens

    all_but_last_block = (len(ids) - 1) // 16 * 16
    assert cached("old") == 0 and cached("old") == all_but_last_block
    assert cached() == 0 and cached(salt="tenant") == 0 and cached(salt="tenant") == all_but_last_block
    subject.remove_adapter("old")
    subject.add_adapter("new", naive.adapter(2))
    assert cached("new") == 0 and cached("new") == all_but_last_block
    with pytest.raises(AdapterError, match="no such adapter"):
        subject.add(request("r", ids, adapter="old"))
    subject.weights_hash = "another base"
    assert cached() == 0


def test_an_adapter_removed_under_way_still_answers():
    subject = engine()
    subject.add_adapter("a", naive.adapter(1))
    subject.add(request("r", prompts()[2], adapter="a", max_tokens=6))
    subject.step()
    subject.remove_adapter("a")
    (last,) = _drain(subject)
    assert tuple(last.token_ids) == expected(2, 6, 1)


def _drain(subject):
    done = []
    while subject.has_work:
        done += [output.completion for output in subject.step() if output.completion is not None]
    return done


def test_a_name_for_two_adapters_is_refused():
    subject = engine()
    subject.add_adapter("a", naive.adapter(1))
    subject.add_adapter("a", naive.adapter(1))
    with pytest.raises(AdapterError, match="another adapter already has this hash"):
        subject.add_adapter("a", naive.adapter(2))


def test_a_seeded_answer_does_not_depend_on_its_companions():
    sampling = {"temperature": 1.3, "max_tokens": 16, "ignore_eos": True}
    kinds = [{}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 200, "top_p": 0.95, "min_p": 0.01}]
    mine = [request(f"m{i}", prompts()[i], seed=i, **sampling, **kind) for i, kind in enumerate(kinds)]
    alone = [engine().generate([r])[0].token_ids for r in mine]
    rng = random.Random(3)
    for limits in ({"max_batch": 32}, {"max_batch": 16, "kv_tokens": 192, "block_size": 8, "step_tokens": 16}):
        others = [
            request(f"o{i}", prompts()[i], seed=i, temperature=rng.choice((0, 0.5, 2)), top_p=rng.choice((1, 0.5)))
            for i in range(20)
        ]
        mixed = [*others, *mine]
        rng.shuffle(mixed)
        answers = {a.request_id: a for a in engine(**limits).generate(mixed)}
        assert [answers[r.id].token_ids for r in mine] == alone
    assert len({tuple(ids) for ids in alone}) == len(alone)


@pytest.mark.parametrize("limits", [{}, {"kv_tokens": 96, "block_size": 8}], ids=str)
def test_sampled_answers_equal_the_naive_loop(limits):
    asked = [
        request(f"r{i}", prompts()[i], temperature=1.5, seed=100 + i, max_tokens=10, ignore_eos=True) for i in range(12)
    ]
    for i, answer in enumerate(engine(**limits).generate(asked)):
        assert answer.token_ids == naive.sampled(prompts()[i], 10, 100 + i, 1.5), i


def test_different_seeds_give_different_answers_and_none_gives_any():
    asked = [request(f"r{i}", prompts()[0], temperature=1.0, max_tokens=12, ignore_eos=True) for i in range(8)]
    first, again = engine().generate(asked), engine().generate(asked)
    assert [a.token_ids for a in first] == [a.token_ids for a in again]
    assert len({tuple(a.token_ids) for a in first}) > 6
    subject = engine()
    for r in asked:
        subject.add(r)
    assert sorted(a.token_ids for a in _drain(subject)) != sorted(a.token_ids for a in first)


def test_logprobs_are_those_of_the_raw_distribution():
    asked = [
        request(f"r{i}", ids, temperature=0.7, top_k=9, frequency_penalty=1.0, seed=i, logprobs=i % 4, max_tokens=8)
        for i, ids in enumerate(prompts()[:8])
    ]
    for r, answer in zip(asked, engine(block_size=4).generate(asked), strict=True):
        whole = [*r.prompt_ids, *answer.token_ids]
        rows = naive.logits_of(whole).log_softmax(-1)[len(r.prompt_ids) - 1 : -1]
        wanted = rows.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(answer.logprobs), wanted, atol=1e-4, rtol=0)
        n = r.params.logprobs
        assert len(answer.top_logprobs) == (len(answer.token_ids) if n else 0)
        for row, tops in zip(rows, answer.top_logprobs, strict=False):
            assert [t for t, _ in tops] == row.topk(n).indices.tolist()
            assert [p for _, p in tops] == pytest.approx(row.topk(n).values.tolist(), abs=1e-4)


def test_outputs_join_to_the_completion():
    subject = engine()
    asked = [request(f"r{i}", ids, temperature=1.0, seed=i, logprobs=2) for i, ids in enumerate(prompts()[:6])]
    for r in asked:
        subject.add(r)
    texts, tokens, logprobs, tops = ({r.id: [] for r in asked} for _ in range(4))
    ends = {}
    while subject.has_work:
        for output in subject.step():
            assert output.request_id not in ends
            texts[output.request_id].append(output.text_delta)
            tokens[output.request_id] += output.token_ids
            logprobs[output.request_id] += output.logprobs
            tops[output.request_id] += output.top_logprobs
            if output.finish_reason is not None:
                ends[output.request_id] = output.completion
    quiet = {a.request_id: a for a in engine().generate(asked)}
    for id, end in ends.items():
        assert "".join(texts[id]) == end.text == quiet[id].text
        assert tokens[id] == end.token_ids == quiet[id].token_ids
        assert logprobs[id] == end.logprobs and tops[id] == end.top_logprobs
        assert end.prompt_tokens == len(prompts()[int(id[1:])])


def test_stop_tokens_end_an_answer_and_are_not_in_its_text():
    (free,) = engine().generate([request("r", prompts()[8], max_tokens=12, ignore_eos=True)])
    stop = free.token_ids[5]
    end = free.token_ids.index(stop)
    (answer,) = engine().generate([request("r", prompts()[8], max_tokens=12, stop_ids=[stop], ignore_eos=True)])
    assert answer.token_ids == free.token_ids[: end + 1] and answer.finish_reason == "stop"
    assert answer.text == naive.tokenizer().decode(free.token_ids[:end])
    assert len(answer.logprobs) == end + 1


def test_the_context_is_the_end():
    subject = engine()
    limit = subject.max_context
    assert limit == 96
    with pytest.raises(ContextLengthError, match="got 96 tokens, wanted at most 95"):
        subject.add(request("r", [5] * limit))
    (answer,) = subject.generate([request("r", [5] * (limit - 1), max_tokens=9, ignore_eos=True)])
    assert len(answer.token_ids) == 1 and answer.finish_reason == "length"
    (answer,) = subject.generate([request("r", [5] * (limit - 4), max_tokens=4, ignore_eos=True)])
    assert len(answer.token_ids) == 4
    small = engine(kv_tokens=32, block_size=8)
    assert small.max_context == 32
    (answer,) = small.generate([request("r", [5] * 20, max_tokens=50, ignore_eos=True)])
    assert len(answer.token_ids) == 12 and answer.token_ids == naive.greedy([5] * 20, 12, stops=False)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (lambda: request("r", []), "prompt is empty"),
        (lambda: request("r", [10**6]), "unknown token ids"),
        (lambda: request("r", [-1]), "unknown token ids"),
        (lambda: request("r", [5], logit_bias={10**6: 1.0}), "names no token"),
        (lambda: request("r", [5], temperature=-1), "`temperature` is out of range"),
        (lambda: request("r", [5], temperature=float("nan")), "`temperature` is out of range"),
        (lambda: request("r", [5], top_p=0), "`top_p` is out of range"),
        (lambda: request("r", [5], max_tokens=0), "`max_tokens` is out of range"),
        (lambda: request("r", [5], stop=[""]), "`stop` is out of range"),
        (lambda: request("r", [5], logprobs=50), "`logprobs` is out of range"),
        (lambda: request("taken", [5]), "under way"),
    ],
)
def test_impossible_requests_are_refused_in_a_sentence(bad, words):
    subject = engine()
    subject.add(request("taken", [5]))
    with pytest.raises(RequestError, match=words):
        subject.add(bad())
    assert len(_drain(subject)) == 1


def test_cancel_frees_at_once_and_keeps_what_was_said():
    subject = engine(max_batch=2)
    for i in range(4):
        subject.add(request(f"r{i}", prompts()[i + 4], max_tokens=9, ignore_eos=True))
    for _ in range(4):
        subject.step()
    held = subject.figures()["kv_blocks_held"]
    running, waiting = subject.cancel("r0"), subject.cancel("r3")
    assert subject.figures()["kv_blocks_held"] < held
    assert running.finish_reason == waiting.finish_reason == "cancelled"
    assert running.token_ids == naive.greedy(prompts()[4], 4, stops=False) and waiting.token_ids == []
    assert running.text == naive.tokenizer().decode(running.token_ids)
    assert subject.cancel("r0") is None and subject.cancel("unknown") is None
    assert {a.request_id for a in _drain(subject)} == {"r1", "r2"}
    subject.cache.pool.check([])


def test_a_failed_step_is_computed_again():
    subject = engine(block_size=4)
    asked = [request(f"r{i}", ids, max_tokens=9) for i, ids in enumerate(prompts()[:6])]
    for r in asked:
        subject.add(r)
    sound, calls = subject.runner.run, []

    def run(step):
        calls.append(step)
        if len(calls) in (1, 4, 5):
            raise MemoryError("no")
        return sound(step)

    subject.runner.run = run
    done = []
    while subject.has_work:
        try:
            done += [o.completion for o in subject.step() if o.completion]
        except MemoryError:
            subject.cache.pool.check([])
    for answer in done:
        assert tuple(answer.token_ids) == expected(int(answer.request_id[1:]), 9)
    assert len(done) == 6


def test_logits_that_are_not_finite_end_their_own_request_only():
    subject = engine()
    broken = naive.LoRA.create(naive.model(), seed=9).requires_grad_(False)
    broken.pair(broken.paths[0])[1].fill_(float("nan"))
    subject.add_adapter("broken", broken)
    subject.add(request("bad", prompts()[2], adapter="broken"))
    subject.add(request("good", prompts()[3], max_tokens=6))
    done = {a.request_id: a for a in _drain(subject)}
    assert done["bad"].finish_reason == "error" and done["bad"].token_ids == []
    assert tuple(done["good"].token_ids) == expected(3, 6)
    with pytest.raises(ModelError, match="not finite"):
        subject.generate([request("bad", prompts()[2], adapter="broken"), request("good", prompts()[3])])
    assert not subject.has_work
    subject.cache.pool.check([])


def test_tokens_beyond_the_tokenizer_are_never_drawn():
    padded = naive.model(vocab_size=512)
    subject = engine(model=padded)
    asked = [request(f"r{i}", p, temperature=9.0, seed=i, ignore_eos=True) for i, p in enumerate(prompts()[:8])]
    assert max(max(a.token_ids) for a in subject.generate(asked)) < naive.tokenizer().vocab_size
    (answer,) = subject.generate([request("r", prompts()[0], max_tokens=8)])
    assert answer.token_ids == naive.greedy(prompts()[0], 8, base=padded)
    whole = naive.logits_of([*prompts()[0], *answer.token_ids], base=padded).log_softmax(-1)
    assert answer.logprobs[0] == pytest.approx(float(whole[len(prompts()[0]) - 1, answer.token_ids[0]]), abs=1e-4)


def test_generate_reports_in_order_and_calls_back():
    heard = []
    asked = [request(f"r{i}", prompts()[i], max_tokens=9 - i, ignore_eos=True) for i in range(4)]
    answers = engine().generate(asked, on_done=heard.append)
    assert [a.request_id for a in answers] == [r.id for r in asked]
    assert [a.request_id for a in heard] == [r.id for r in reversed(asked)]
    assert engine().generate([]) == []


class AnyOrder(RuleBasedStateMachine):
    """Requests come, go and are computed in any order: no block is lost or shared wrongly, and answers stay right."""

    @initialize(
        blocks=st.integers(3, 12), max_batch=st.integers(1, 6), step_tokens=st.integers(1, 40), reuse=st.booleans(),
        compiles=st.booleans(),
    )  # fmt: skip
    def start(self, blocks, max_batch, step_tokens, reuse, compiles):
        self.subject = engine(
            kv_tokens=32 * blocks, block_size=32 if blocks % 2 else 8, max_batch=max_batch, step_tokens=step_tokens,
            prefix_reuse=reuse, compiles=compiles,
        )  # fmt: skip
        assert self.subject.compile() == compiles
        self.subject.add_adapter("one", naive.adapter(1))
        self.count = 0
        self.kinds = {}

    @rule(place=st.integers(0, 23), tokens=st.sampled_from((1, 4, 12)), adapted=st.booleans(), times=st.integers(1, 3))
    def add(self, place, tokens, adapted, times):
        """The same prompt several times: one of them computes what the others share, in the same step."""
        if len(prompts()[place]) >= self.subject.max_context:
            return
        adapter = "one" if adapted else None
        for _ in range(times):
            id = f"r{self.count}"
            self.count += 1
            self.subject.add(request(id, prompts()[place], adapter=adapter, max_tokens=tokens, salt=str(place % 3)))
            self.kinds[id] = (place, tokens, adapted)

    @rule(which=st.integers(0, 50))
    def cancel(self, which):
        known = [id for id in self.kinds if id in self.subject._sequences]
        if known:
            id = known[which % len(known)]
            self.check(self.subject.cancel(id), whole=False)

    @rule(steps=st.integers(1, 5))
    def steps(self, steps):
        for _ in range(steps):
            for output in self.subject.step():
                if output.completion is not None:
                    self.check(output.completion, whole=True)

    def check(self, answer, whole):
        place, tokens, adapted = self.kinds[answer.request_id]
        room = self.subject.max_context - len(prompts()[place])
        wanted = list(expected(place, tokens, 1 if adapted else None))[:room]
        assert answer.token_ids == wanted if whole else answer.token_ids == wanted[: len(answer.token_ids)]

    @invariant()
    def blocks_sum_to_the_pool(self):
        if hasattr(self, "subject"):
            self.subject.cache.pool.check(self.subject._sequences.values())
            seated = [s.row for s in self.subject.scheduler.running]
            assert sorted(seated + self.subject.scheduler._free_rows) == list(range(self.subject.max_batch))

    def teardown(self):
        if hasattr(self, "subject"):
            for _ in range(2000):
                if not self.subject.has_work:
                    break
                self.steps(1)
            assert not self.subject.has_work, "the engine does not come to an end"
            self.subject.cache.pool.check([])


AnyOrder.TestCase.settings = settings(
    max_examples=12, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
TestAnyOrder = AnyOrder.TestCase


def test_half_precision_answers_too():
    half = naive.Transformer(naive.model().config)
    half.load_state_dict(naive.model().state_dict())
    half.to(torch.bfloat16)
    asked = [request(f"r{i}", ids, max_tokens=6) for i, ids in enumerate(prompts()[:8])]
    for r, answer in zip(asked, engine(model=half).generate(asked), strict=True):
        rows = naive.logits_of([*r.prompt_ids, *answer.token_ids], base=half).float().log_softmax(-1)
        wanted = rows[len(r.prompt_ids) - 1 : -1].gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(answer.logprobs), wanted, atol=0.15, rtol=0)


def test_a_request_is_not_changed_by_the_engine():
    asked = Request("r", (5, 6, 7), SamplingParams(max_tokens=2, temperature=0))
    engine().generate([asked])
    assert asked.prompt_ids == (5, 6, 7) and asked.stream
