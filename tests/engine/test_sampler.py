"""The sampler: right distributions, filters as in transformers, a stream per seed."""

import numpy as np
import pytest
import torch

from prairie.engine.request import Request, SamplingParams, Sequence
from prairie.engine.sampler import CANDIDATES, Sampler, uniform

VOCAB = 400
DRAWS = 20_000


def seat(sampler: Sampler, row: int, params: SamplingParams, seed: int = 0, generated: tuple[int, ...] = ()) -> None:
    sequence = Sequence(
        Request("r", [1], params), arrival=0, seed=seed, max_length=9, stop_ids=frozenset(), stream=None,
        root_hash=b"", lora=None,
    )  # fmt: skip
    sequence.row = row
    sequence.ids += generated
    sampler.seat(sequence)


def logits(scale: float = 2.0, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * scale


def draw(params: SamplingParams, row_V: torch.Tensor, count: int = DRAWS) -> torch.Tensor:
    """Counts of each token over many steps of 50 requests."""
    sampler = Sampler(50, len(row_V))
    for row in range(50):
        seat(sampler, row, params, seed=row)
    rows = np.tile(np.arange(50), count // 50)
    counters = np.repeat(np.arange(count // 50), 50)
    tokens = sampler(row_V.expand(count, -1), rows, counters).tokens
    return torch.bincount(torch.tensor(tokens), minlength=len(row_V))


def as_transformers(params: SamplingParams, row_V: torch.Tensor) -> torch.Tensor:
    """The distribution after transformers' own processors, in their order."""
    processors = pytest.importorskip("transformers").generation.logits_process
    chain = [processors.TemperatureLogitsWarper(params.temperature)]
    if params.top_k:
        chain.append(processors.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(processors.TopPLogitsWarper(params.top_p))
    if params.min_p:
        chain.append(processors.MinPLogitsWarper(params.min_p))
    row_1V = row_V.unsqueeze(0).double()
    for process in chain:
        row_1V = process(None, row_1V)
    return row_1V.softmax(-1)[0]


KINDS = [
    {},
    {"temperature": 0.5},
    {"temperature": 1.7},
    {"top_k": 7},
    {"top_k": CANDIDATES + 50},
    {"top_k": VOCAB + 5, "temperature": 0.8},
    {"top_p": 0.6},
    {"top_p": 0.98, "temperature": 2.0},
    {"min_p": 0.05},
    {"top_k": 20, "top_p": 0.7, "min_p": 0.1, "temperature": 1.2},
    {"top_k": 200, "top_p": 0.9},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_draws_follow_the_distribution_of_transformers(kind):
    params, row_V = SamplingParams(**kind), logits()
    wanted, counts = as_transformers(params, row_V), draw(params, row_V)
    assert counts[wanted == 0].sum() == 0, "a filtered token was drawn"
    often = wanted * DRAWS >= 5
    expected = torch.cat([wanted[often], wanted[~often].sum().view(1)]) * DRAWS
    seen = torch.cat([counts[often], counts[~often].sum().view(1)])
    chi_square = float(((seen - expected) ** 2 / expected.clamp_min(1e-9)).sum())
    freedom = len(expected) - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5 + 5, (chi_square, freedom)


def test_the_numbers_are_uniform_and_uncorrelated():
    seeds, counters = np.meshgrid(np.arange(200, dtype=np.uint64), np.arange(200, dtype=np.uint64))
    numbers = uniform(seeds, counters)
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = np.histogram(numbers, 100, (0, 1))[0]
    assert ((counts - 400) ** 2 / 400).sum() < 99 + 5 * (2 * 99) ** 0.5
    for other in (np.roll(numbers, 1, 0), np.roll(numbers, 1, 1), np.roll(numbers, (1, 1), (0, 1))):
        assert abs(np.corrcoef(numbers.ravel(), other.ravel())[0, 1]) < 5 / 200
    assert len(np.unique(numbers)) == numbers.size


def test_a_row_draws_the_same_in_any_batch():
    """Whatever the neighbours ask for, and wherever the row stands."""
    rng = np.random.default_rng(0)
    params = [SamplingParams(**kind, seed=1) for kind in [*KINDS, {"temperature": 0.0}, {"frequency_penalty": 1.0}]]
    rows_V = torch.stack([logits(seed=i) for i in range(len(params))])
    alone = []
    for i, p in enumerate(params):
        sampler = Sampler(1, VOCAB)
        seat(sampler, 0, p, seed=i)
        alone.append([sampler(rows_V[i : i + 1], np.array([0]), np.array([t])).tokens[0] for t in range(6)])
    for _ in range(3):
        order = rng.permutation(len(params))
        places = rng.permutation(30)[: len(params)]
        sampler = Sampler(30, VOCAB)
        for i in order:
            seat(sampler, int(places[i]), params[i], seed=int(i))
        for t in range(6):
            tokens = sampler(rows_V[order], places[order], np.full(len(order), t)).tokens
            assert tokens == [alone[i][t] for i in order]


def test_greedy_takes_the_best_and_a_tiny_temperature_nearly_always():
    row_V = logits()
    assert draw(SamplingParams(temperature=0), row_V, 50)[row_V.argmax()] == 50
    assert draw(SamplingParams(temperature=1e-30), row_V, 50)[row_V.argmax()] == 50
    assert draw(SamplingParams(temperature=0.01), row_V, 50)[row_V.argmax()] == 50


def test_penalties_follow_openai_and_count_generated_tokens_only():
    params = SamplingParams(temperature=0, presence_penalty=0.5, frequency_penalty=0.25)
    sampler = Sampler(3, VOCAB)
    seat(sampler, 2, params, generated=(7, 7, 9))
    seat(sampler, 1, SamplingParams(temperature=0))
    row_V = torch.zeros(VOCAB)
    row_V[1], row_V[7], row_V[9], row_V[11] = 2.0, 2.9, 2.7, 1.9  # 1 is in the prompt
    chosen = []
    for t in range(4):
        sampled = sampler(row_V.expand(2, -1), np.array([2, 1]), np.array([3 + t, t]))
        chosen.append(sampled.tokens[0])
        assert sampled.tokens[1] == 7, "another row's penalty"
    # 7: 2.9 - 0.5 - 0.25 x 2 = 1.9; 9: 2.7 - 0.75 = 1.95; 1: 2.0 first, 1.25 after it was said; 11: 1.9, then 1.15
    assert chosen[0] == 1 and chosen[1] == 9 and set(chosen[2:]) == {7, 11}
    seat(sampler, 2, params)
    assert sampler(row_V.expand(1, -1), np.array([2]), np.array([0])).tokens == [7], "counts outlive their sequence"


def test_a_bias_moves_one_row_and_no_logprob():
    sampler = Sampler(2, VOCAB)
    seat(sampler, 0, SamplingParams(temperature=0, logit_bias={5: 100.0, 6: -100.0}))
    seat(sampler, 1, SamplingParams(temperature=0))
    row_V = logits()
    sampled = sampler(row_V.expand(2, -1), np.array([0, 1]), np.array([0, 0]))
    assert sampled.tokens == [5, int(row_V.argmax())]
    wanted = row_V.log_softmax(-1)[sampled.tokens]
    torch.testing.assert_close(torch.tensor(sampled.logprobs), wanted)


def test_rows_that_are_not_finite_are_named():
    sampler = Sampler(3, VOCAB)
    for row in range(3):
        seat(sampler, row, SamplingParams(seed=row))
    rows_V = torch.stack([logits(), torch.full((VOCAB,), float("nan")), logits()])
    sampled = sampler(rows_V, np.arange(3), np.zeros(3, dtype=np.int64))
    assert sampled.broken == [False, True, False]
    sampler2 = Sampler(1, VOCAB)
    seat(sampler2, 0, SamplingParams(seed=2))
    assert sampler2(rows_V[2:], np.array([0]), np.array([0])).tokens == sampled.tokens[2:]


def test_minus_infinity_is_never_drawn():
    row_V = torch.full((VOCAB,), float("-inf"))
    row_V[[3, 399]] = torch.tensor([0.0, 0.0])
    for kind in ({}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.5}):
        counts = draw(SamplingParams(**kind), row_V, 1000)
        assert counts[3] + counts[399] == 1000 and min(counts[3], counts[399]) > 400
