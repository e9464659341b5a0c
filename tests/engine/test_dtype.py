"""Weights that are bfloat16 numbers are kept in bfloat16 where that is faster, and not a bit of an answer changes."""

from __future__ import annotations

import copy

import naive
import pytest
import torch
from naive import engine, prompts, request

from prairie.engine import probe
from prairie.errors import ModelError
from prairie.models.lora import LoRA, LoRAConfig
from prairie.models.quantized import quantize
from prairie.models.weights import hash_of, named_state
from prairie.ops.attention import PackedDocuments
from prairie.ops.packed import PackedWeight


@pytest.fixture
def rounded(monkeypatch):
    """The tiny model with weights that bfloat16 holds; what the probe would find faster is said by the test."""
    made = copy.deepcopy(naive.model())
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(parameter.bfloat16())
    monkeypatch.setattr(probe, "SLOWER", 1e9)
    monkeypatch.setattr(probe, "GAIN", 1e9)
    return made


def asked(adapter=None):
    """Greedy and seeded, with the adapter and without."""
    kinds = [{}, {"temperature": 1.1, "seed": 3, "logprobs": 2}, {"temperature": 0.8, "seed": 4, "top_p": 0.9}]
    return [
        request(f"r{i}", ids, adapter if i % 2 else None, max_tokens=10, **kinds[i % 3])
        for i, ids in enumerate(prompts()[:12])
    ]


def adapter_on(base):
    lora = LoRA.create(base, LoRAConfig(rank=4, targets="all-linear"), seed=3).requires_grad_(False).eval()
    for path in lora.paths:
        lora.pair(path)[1].normal_(0, 0.3, generator=torch.Generator().manual_seed(5))
    return lora


def test_every_answer_has_the_same_bits(rounded):
    lora = adapter_on(rounded)
    hash, weights = hash_of(rounded), {name: value.clone() for name, value in named_state(rounded).items()}
    wide = engine(model=copy.deepcopy(rounded), dtype="float32", weights_hash=hash)
    narrow = engine(model=rounded, dtype="auto", weights_hash=hash)
    assert wide.compile() and narrow.compile()
    assert narrow.choice.dtype == "bfloat16" and wide.choice.dtype == "float32"
    for subject in (wide, narrow):
        subject.add_adapter("lora", lora)
        subject.runner._run_torch = None  # whatever is not compiled fails
    wanted, found = wide.generate(asked("lora")), narrow.generate(asked("lora"))
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours.token_ids, ours.logprobs, ours.top_logprobs) == (
            theirs.token_ids, theirs.logprobs, theirs.top_logprobs,
        )  # fmt: skip
    for i, one in enumerate(asked("lora")[:6]):  # and alone
        if one.params.seed is not None:
            (alone,) = narrow.generate([one])
            assert (alone.token_ids, alone.logprobs) == (wanted[i].token_ids, wanted[i].logprobs)
    # The model itself: its matrices are packed, its numbers and its name are what they were.
    assert isinstance(rounded.layers[0].qkv, PackedWeight) and isinstance(rounded.embed, PackedWeight)
    assert hash_of(rounded) == hash and rounded.quantization is None
    dense = {"embed_tokens": rounded.linear(None, "embed").dense().T, "lm_head": rounded.linear(None, "head").dense()}
    for name, value in dense.items():
        assert torch.equal(value, next(w for key, w in weights.items() if name in key))
    other = LoRA.create(copy.deepcopy(naive.model(1)), LoRAConfig(rank=4), seed=3)
    with pytest.raises(Exception, match="stands on base"):
        narrow.add_adapter("other", other)


def test_torch_goes_on_with_what_the_model_then_keeps(rounded):
    """Prompts' own log-probabilities, embeddings and adapters that are not compiled are computed by torch."""
    plain = copy.deepcopy(rounded)
    subject = engine(model=rounded, dtype="auto")
    assert subject.compile()
    subject.generate([request("r", prompts()[0], max_tokens=2)])
    assert isinstance(rounded.embed, PackedWeight)
    for ids in prompts()[:4]:
        torch.testing.assert_close(
            naive.logits_of(ids, base=rounded), naive.logits_of(ids, base=plain), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize(("bits", "within"), [(None, 1e-5), ("bf16", 1e-3)])
def test_log_probabilities_are_the_trainers(bits, within):
    """Of sampled tokens, in a batch, by what an objective asks the model for."""
    served, trained = copy.deepcopy(naive.model()), copy.deepcopy(naive.model())
    if bits is not None:
        quantize(served, bits, [prompts()[5]], head=True)
        with torch.no_grad():
            for parameter in trained.parameters():
                if parameter.ndim == 2:
                    parameter.copy_(parameter.bfloat16())
    subject = engine(model=served)
    assert subject.compile()
    given = [request(f"r{i}", ids, max_tokens=9, temperature=1.0, seed=i) for i, ids in enumerate(prompts()[:8])]
    for ids, answer in zip(prompts(), subject.generate(given), strict=False):
        whole = torch.tensor([*ids, *answer.token_ids])
        hidden_ND = trained(whole, PackedDocuments([len(whole)]))[len(ids) - 1 : -1]
        wanted = trained.logprobs(hidden_ND, whole[len(ids) :])
        torch.testing.assert_close(torch.tensor(answer.logprobs), wanted, atol=within, rtol=0)


@pytest.mark.parametrize("slower", ["a token", "a batch"])
def test_what_is_not_faster_stays(rounded, monkeypatch, slower):
    monkeypatch.setattr(probe, "GAIN" if slower == "a token" else "SLOWER", 0.0)
    before = rounded.layers[0].qkv
    subject = engine(model=rounded, dtype="auto")
    assert subject.compile() and subject.choice.dtype == "float32"
    assert "bfloat16 holds them to the last bit too, and is not faster here" in str(subject.choice)
    (answer,) = subject.generate([request("r", prompts()[5], max_tokens=8)])
    assert answer.token_ids == naive.greedy(prompts()[5], 8, base=rounded)
    assert rounded.layers[0].qkv is before


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_successor_of_the_same_shape_is_not_tried_again(rounded, monkeypatch, dtype):
    """A swap waits between two steps for the new model's compiled form."""
    if dtype == "float32":
        monkeypatch.setattr(probe, "SLOWER", 0.0)
    first, second = engine(model=copy.deepcopy(rounded), dtype="auto"), engine(model=rounded, dtype="auto")
    assert first.compile() and first.choice.dtype == dtype
    monkeypatch.setattr(second.runner.compiled, "_probed", None)  # trying fails
    assert second.compile(like=first) and second.choice == first.choice
    (answer,) = second.generate([request("r", prompts()[5], max_tokens=8)])
    assert answer.token_ids == naive.greedy(prompts()[5], 8, base=rounded)
    assert isinstance(rounded.embed, PackedWeight) == (dtype == "bfloat16")
    third = engine(model=naive.model(0, 4), dtype="auto")
    assert third.compile(like=first) and third.choice.why == "bfloat16 would round them", "of another shape"


def test_one_number_that_bfloat16_would_round_is_enough(rounded):
    with torch.no_grad():
        rounded.layers[1].down[3, 7] = 1 + 2**-12
    subject = engine(model=rounded, dtype="auto", threads=1)
    assert subject.compile() and subject.choice.dtype == "float32"
    assert subject.choice.to_json()["dtype_why"] == "bfloat16 would round them"
    subject.generate([request("r", prompts()[5], max_tokens=2)])
    assert not isinstance(rounded.layers[0].qkv, PackedWeight)


def test_a_vocabulary_that_bfloat16_would_round_stays_beside_packed_blocks(rounded):
    with torch.no_grad():
        rounded.embed[2, 0] = 1 + 2**-12
    wide = engine(model=copy.deepcopy(rounded), dtype="float32")
    subject = engine(model=rounded, dtype="auto", threads=1)
    assert wide.compile() and subject.compile() and subject.choice.dtype == "bfloat16"
    for ours, theirs in zip(subject.generate(asked()), wide.generate(asked()), strict=True):
        assert ours.token_ids == theirs.token_ids and ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
    assert isinstance(rounded.layers[0].qkv, PackedWeight) and not isinstance(rounded.embed, PackedWeight)


def test_one_function_computes_every_batch(rounded):
    """Compiling per size of a batch would stop the server at the first of each size; here one compiled function serves
    all of them, and torch answers until it is there."""
    from prairie.ops import decoder

    subject = engine(model=rounded, max_batch=8, step_tokens=64)
    eager, took = subject.runner._run_torch, []
    subject.runner._run_torch = lambda *given: took.append("torch") or eager(*given)
    subject.generate([request("r", prompts()[0], max_tokens=3)])
    assert took, "until it is ready torch answers"
    assert subject.compile()
    took.clear()
    for kernel in (decoder.decoder_step, decoder._work):
        before = len(kernel.signatures)
        for size in (1, 2, 3, 5, 8):
            subject.generate([request(f"r{i}", ids, max_tokens=2 + i) for i, ids in enumerate(prompts()[:size])])
        assert before == len(kernel.signatures) <= 1
    assert not took


def test_two_ways_to_keep_weights_are_refused(tmp_path):
    from prairie.engine.language_model import LanguageModel

    with pytest.raises(ModelError, match="two ways are asked for in which weights shall be kept"):
        LanguageModel.load(tmp_path, dtype="bfloat16", quantize="int8")
