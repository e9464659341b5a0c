"""A prompt that rows share is computed once, and nothing else changes: states, losses, gradients."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import VOCAB, tiny_model

from prairie.data.loader import Batch, Loader, TokenDataset, batch_of, prompts_of
from prairie.models.lora import AdapterRows, LoRA, LoRAConfig
from prairie.train import prefixes
from prairie.train.objective import asked_of, every_batch, hidden_states
from prairie.train.objectives.causal_lm import CausalLM
from prairie.train.objectives.dpo import DPO, DPOConfig, reference_logprobs
from prairie.train.prefixes import layout_of
from prairie.train.trainer import accumulate_gradients


def shared_prompts(prompts: int = 3, pairs: int = 3, seed: int = 0, apart: bool = False) -> TokenDataset:
    """`pairs` preferences for each prompt of 18 to 30 tokens; `apart`: those of one prompt do not follow each other."""
    rng = np.random.default_rng(seed)
    heads = [rng.integers(0, VOCAB, rng.integers(18, 31)) for _ in range(prompts)]
    order = (
        [p for _ in range(pairs) for p in range(prompts)] if apart else np.repeat(np.arange(prompts), pairs).tolist()
    )
    rows, masks = [], []
    for prompt in order:
        for _ in range(2):
            tail = rng.integers(0, VOCAB, rng.integers(1, 20))
            rows.append(np.concatenate([heads[prompt], tail]).astype(np.uint32))
            masks.append(np.arange(len(rows[-1])) >= len(heads[prompt]))
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return TokenDataset(np.concatenate(rows), np.concatenate(masks), offsets, group=2)


@pytest.fixture
def unshared(monkeypatch: pytest.MonkeyPatch):
    """Calls something with every row computed whole."""

    def call(work):
        with monkeypatch.context() as patch:
            patch.setattr(prefixes, "LEAST_SHARED", 10**9)
            return work()

    return call


def test_a_prompt_of_all_its_pairs_is_computed_once():
    dataset = shared_prompts(prompts=2, pairs=4)
    batch = batch_of(dataset, range(16))
    layout = layout_of(batch)
    assert [prefix.row for prefix in layout.prefixes if prefix.tokens] == [0] * 7 + [8] * 7
    answers = int(dataset.mask.sum())
    assert len(layout.tokens) < answers + 2 * 31  # the two prompts once, and what is learnt
    assert torch.equal(layout.tokens[layout.places_N], batch.tokens_N)


def test_rows_that_share_nothing_are_left_alone():
    batch = batch_of(shared_prompts(prompts=4, pairs=1), [0, 2, 4, 6])
    layout = layout_of(batch)
    assert layout.tokens is batch.tokens_N and layout.places_N is None and not layout.prefixes


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), min_size=1, max_size=8))
def test_any_rows_have_the_states_they_would_have_alone(rows: list[list[int]]) -> None:
    tokens = torch.tensor([token for row in rows for token in row])
    batch = Batch(tokens, torch.full_like(tokens, -100), [len(row) for row in rows], list(range(len(rows))))
    model = tiny_model()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(prefixes, "LEAST_SHARED", 1)
        together = hidden_states(model, batch, (), every=True)[0]
        patch.setattr(prefixes, "LEAST_SHARED", 10**9)
        apart = hidden_states(model, batch, (), every=True)[0]
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


def test_the_last_layer_is_computed_for_those_who_are_asked():
    """Two rows share a prompt, so both ask for its last token; a row's last token is asked for without a label."""
    batch, model = batch_of(shared_prompts(), range(8)), tiny_model()
    asked = asked_of(layout_of(batch), batch)
    assert asked is not None and len(asked.wanted_W) < len(asked.at_A) < len(batch.tokens_N)
    few, labels = hidden_states(model, batch, ())
    every, _ = hidden_states(model, batch, (), every=True)
    ends = torch.tensor(batch.lengths).cumsum(0) - 1
    for places in (labels != -100, ends):
        torch.testing.assert_close(few[places], every[places])
    assert not few[: batch.lengths[0] // 4].any()


@pytest.mark.parametrize("kind", ["causal_lm", "dpo", "dpo_lora"])
def test_gradients_are_those_of_whole_rows(kind, unshared):
    """Within 1e-5, relative; for the base's weights and for an adapter's."""
    dataset = shared_prompts()
    model, adapters = tiny_model(), []
    if kind == "dpo_lora":
        adapter = LoRA.create(model.requires_grad_(False), LoRAConfig(rank=4), seed=1)
        with torch.no_grad():
            for path in adapter.paths:
                adapter.pair(path)[1].normal_(0, 0.2, generator=torch.Generator().manual_seed(3))
        adapters = [AdapterRows(adapter)]
    learner = adapters[0].lora if adapters else model
    batch = batch_of(dataset, range(len(dataset.offsets) - 1))

    def run():
        reference = reference_logprobs(tiny_model(seed=5), dataset)
        objective = CausalLM() if kind == "causal_lm" else DPO(DPOConfig(sft_weight=0.3), reference)
        learner.zero_grad()
        sums = accumulate_gradients(model, objective, [batch], adapters)
        return float(sums.loss), [p.grad.clone() for p in learner.parameters()], reference

    (loss, grads, reference), (plain_loss, plain_grads, plain_reference) = run(), unshared(run)
    assert loss == pytest.approx(plain_loss, rel=1e-5)
    torch.testing.assert_close(reference, plain_reference, rtol=1e-5, atol=1e-5)
    assert max(float((a - b).norm() / b.norm()) for a, b in zip(grads, plain_grads, strict=True)) < 1e-5


@pytest.mark.parametrize("apart", [False, True])
def test_the_loader_keeps_the_pairs_of_a_prompt_together(apart):
    dataset = shared_prompts(prompts=5, pairs=3, apart=apart)
    loader = Loader(dataset, tokens_per_batch=10**6, seed=2)
    rows = loader.next_step()[0].rows
    assert sorted(rows) == list(range(30))
    prompts = prompts_of(dataset)[np.array(rows[::2]) // 2].tolist()
    assert [prompts[i] for i in range(0, 15, 3)] == list(dict.fromkeys(prompts))
    first = next(every_batch(dataset, 10**6))
    seen = prompts_of(dataset)[np.array(first.rows[::2]) // 2].tolist()
    assert seen == sorted(seen, key=seen.index) and len(set(seen[:3])) == 1


def test_distinct_prompts_keep_their_order():
    """The permutation is the one of the seed, as it was before prompts were looked at."""
    dataset = shared_prompts(prompts=9, pairs=1)
    loader = Loader(dataset, tokens_per_batch=10**6, seed=4)
    wanted = np.random.Generator(np.random.PCG64([4, 0])).permutation(9)
    assert loader.next_step()[0].rows == [row for group in wanted for row in (2 * group, 2 * group + 1)]
