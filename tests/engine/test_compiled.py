"""The compiled step against torch's and the naive loop: the same logits, the same tokens, the same cache."""

from __future__ import annotations

import copy
import gc
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import naive
import pytest
import torch
from naive import engine, expected, prompts, request

from prairie.engine.compiled import covers
from prairie.engine.constraint import Constraint
from prairie.models.config import ModelConfig, RopeScaling
from prairie.models.lora import LoRA, LoRAConfig
from prairie.models.quantized import quantize
from prairie.models.transformer import Transformer

SIZES = {"dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 48, "max_context": 96}
KINDS = {
    "llama": {},
    "one kv head each": {"kv_heads": 4},
    "tied": {"tie_embeddings": True},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": "head", "head_dim": 16},
    "biases": {"o_bias": True, "mlp_bias": True, "qkv_bias": True},
    "windows": {"windows": (5, 0)},
    "offset norms, scaled embeddings": {"norm_offset": True, "embed_scale": 5.0, "attention_scale": 0.3},
    "no positions in a layer": {"nope_layers": (1,)},
    "half turned": {"rotary_dim": 4},
    "stretched": {"rope_scaling": RopeScaling("llama3", 8.0, original_max_context=32)},
    "yarn": {"rope_scaling": RopeScaling("yarn", 4.0, original_max_context=32, magnitude=1.2)},
}


def model(**changes) -> Transformer:
    config = ModelConfig(naive.tokenizer().vocab_size, **{**SIZES, "tie_embeddings": False, **changes})
    made = Transformer(config).init_weights(1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return made.requires_grad_(False).eval()


def compiled(**settings):
    made = engine(**settings)
    assert made.compile()
    made.runner._run_torch = None  # whatever is not compiled fails
    return made


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_every_covered_kind_answers_as_the_naive_loop(kind):
    subject = compiled(model=model(**KINDS[kind]), step_tokens=24, block_size=8)
    asked = [request(f"r{i}", ids, max_tokens=8, ignore_eos=True) for i, ids in enumerate(prompts()[:9])]
    for ids, answer in zip(prompts(), subject.generate(asked), strict=False):
        whole = [*ids, *answer.token_ids]
        logits_TV = naive.logits_of(whole, base=subject.model)[len(ids) - 1 : -1]
        assert answer.token_ids == logits_TV[:, : naive.tokenizer().vocab_size].argmax(-1).tolist()
        wanted = logits_TV.log_softmax(-1).gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(answer.logprobs), wanted, atol=1e-5, rtol=1e-5)


def test_weights_that_are_too_large_to_be_copied(monkeypatch):
    monkeypatch.setattr("prairie.engine.compiled.COPIED_BYTES", 0)
    subject = compiled(step_tokens=24)
    answers = subject.generate([request(f"r{i}", ids, max_tokens=9) for i, ids in enumerate(prompts())])
    assert [tuple(a.token_ids) for a in answers] == [expected(i, 9) for i in range(len(answers))]


@pytest.mark.parametrize(
    "limits", [{}, {"step_tokens": 8, "max_batch": 4}, {"kv_tokens": 96, "block_size": 4}], ids=str
)
def test_batches_chunks_and_preemption(limits):
    subject = compiled(**limits)
    answers = subject.generate([request(f"r{i}", ids, max_tokens=9) for i, ids in enumerate(prompts())])
    assert [tuple(a.token_ids) for a in answers] == [expected(i, 9) for i in range(len(answers))]
    assert (subject.scheduler.preemptions > 0) == ("kv_tokens" in limits)


@pytest.mark.long
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc, which can spoil memory that is given back")
def test_nothing_is_read_that_was_given_back():
    """Where memory is overwritten as soon as it is free: what other threads do with it only now and then."""
    test = f"{Path(__file__)}::{test_batches_chunks_and_preemption.__name__}[{{}}]"
    spoilt = {**os.environ, "MALLOC_PERTURB_": "165", "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=", test]
    ended = subprocess.run(command, env=spoilt, capture_output=True, text=True, check=False)
    assert ended.returncode == 0 and "1 passed" in ended.stdout, ended.stdout[-3000:] + ended.stderr[-1000:]


@pytest.mark.parametrize("bits", ["bf16", "int8", "int4"])
def test_packed_weights(bits):
    packed = copy.deepcopy(naive.model())
    quantize(packed, bits, [prompts()[5]], head=True)
    plain = copy.deepcopy(naive.model())
    with torch.no_grad():
        for theirs, ours in zip(packed.linears(), plain.linears(), strict=True):
            ours.dense().copy_(theirs.dense())
    subject = compiled(model=packed)
    answers = subject.generate([request(f"r{i}", ids, max_tokens=8) for i, ids in enumerate(prompts()[:12])])
    for ids, answer in zip(prompts(), answers, strict=False):
        assert answer.token_ids == naive.greedy(ids, 8, base=plain)


@pytest.mark.parametrize("bits", ["panels", "rows", "bf16", "int8", "int4"])
def test_adapters_mixed_with_the_base(bits, monkeypatch):
    base = copy.deepcopy(naive.model())
    if bits == "rows":
        monkeypatch.setattr("prairie.engine.compiled.COPIED_BYTES", 0)
    elif bits != "panels":
        quantize(base, bits, [prompts()[5]], head=True)
    subject = compiled(model=base)
    inside = LoRA.create(base, LoRAConfig(rank=12, targets="all-linear"), seed=3)
    stacked = LoRA.create(base, LoRAConfig(rank=3, targets=["q_proj", "down_proj"]), seed=4, parent=inside)
    for lora in (inside, stacked):
        lora.requires_grad_(False).eval()
        for path in lora.paths:
            lora.pair(path)[1].normal_(0, 0.3, generator=torch.Generator().manual_seed(5))
    subject.add_adapter("inside", inside)
    subject.add_adapter("stacked", stacked)
    which = [None, "inside", "stacked", "inside", None, "stacked"] * 4
    asked = [request(f"r{i}", ids, w, max_tokens=6) for i, (ids, w) in enumerate(zip(prompts(), which, strict=True))]
    loras = {None: None, "inside": inside, "stacked": stacked}
    answers = subject.generate(asked)
    for ids, w, answer in zip(prompts(), which, answers, strict=True):
        assert answer.token_ids == naive.greedy(ids, 6, loras[w], base)
    assert len({tuple(a.token_ids) for a in answers}) > 12


def test_steps_may_go_either_way():
    """What torch cached the compiled step reads, and the other way round: each step of an answer goes at random."""
    subject = engine(block_size=4)
    assert subject.compile()
    runner, taken = subject.runner, []
    takes = runner.compiled.takes
    runner.compiled.takes = lambda step: bool(taken.append(len(taken)) or len(taken) % 3) and takes(step)
    answers = subject.generate([request(f"r{i}", ids, max_tokens=12) for i, ids in enumerate(prompts())])
    assert [tuple(a.token_ids) for a in answers] == [expected(i, 12) for i in range(len(answers))]
    assert len(taken) > 12


@pytest.mark.parametrize("threads", [2, 5])
def test_helpers(threads):
    """More threads than cores: they come late, are set aside in the middle of a piece, and leave late."""
    before = set(threading.enumerate())  # helpers of engines that are no more may end meanwhile
    subject = compiled(step_tokens=24, threads=threads)
    subject.add_adapter("hash1", naive.adapter(1))
    which = [("hash1", 1) if i % 5 == 4 else (None, None) for i in range(len(prompts()))]
    asked = [request(f"r{i}", ids, which[i][0], max_tokens=9) for i, ids in enumerate(prompts())]
    answers = subject.generate(asked)
    assert [tuple(a.token_ids) for a in answers] == [expected(i, 9, seed) for i, (_, seed) in enumerate(which)]
    helpers = set(threading.enumerate()) - before
    assert len(helpers) == threads - 1
    del subject
    gc.collect()
    for helper in helpers:
        helper.join(60)
        assert not helper.is_alive()


def test_the_probe_leaves_no_trace(monkeypatch):
    """Whatever it chooses: an answer that torch began goes on from the cache as it was."""
    monkeypatch.setattr("prairie.engine.compiled.most_threads", lambda: 2)
    subject = engine(block_size=4)
    for i, ids in enumerate(prompts()[:6]):
        subject.add(request(f"r{i}", ids, max_tokens=9))
    for _ in range(3):
        subject.step()
    before = subject.cache.store.clone()
    assert subject.choice is None
    assert subject.compile()
    torch.testing.assert_close(subject.cache.store, before, rtol=0, atol=0)
    assert set(subject.choice.step_ms) == {(1, 2), (1, 1), (16, 2), (16, 1)}
    done = {}
    while subject.has_work:
        done |= {o.request_id: o.completion for o in subject.step() if o.completion}
    assert [tuple(done[f"r{i}"].token_ids) for i in range(6)] == [expected(i, 9) for i in range(6)]


def test_sampling_and_penalties_draw_the_same():
    digits = {"constraint": Constraint.regex("[0-9]{4}")}
    kinds = [
        digits,
        {"top_k": 5},
        {"top_p": 0.8},
        {},
        {"frequency_penalty": 1.0},
        {"logprobs": 3},
        {"logit_bias": {7: 5.0}},
    ]
    asked = [
        request(f"r{i}", prompts()[i], temperature=0.9 if i % 2 else 0.0, seed=i, max_tokens=8, **kinds[i % 7])
        for i in range(21)
    ]
    ours, theirs = compiled().generate(asked), engine(compiles=False).generate(asked)
    assert [a.token_ids for a in ours] == [a.token_ids for a in theirs]
    assert all(a.text.isdecimal() for a in ours[::7])
    for a, b in zip(ours, theirs, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_a_broken_model_is_told():
    broken = model()
    with torch.no_grad():
        broken.layers[1].down[3, 2] = float("nan")
    with pytest.raises(Exception, match="not finite"):
        compiled(model=broken).generate([request("r", prompts()[3], max_tokens=3)])


def test_what_is_not_covered_goes_through_torch():
    for changes in ({"attention_softcap": 20.0}, {"activation": "gelu"}, {"norm_at": "both"}, {"ffn_dim": 44}):
        subject = engine(model=model(**changes))
        assert not covers(subject.model) and not subject.compile()
        (answer,) = subject.generate([request("r", prompts()[2], max_tokens=4)])
        assert answer.token_ids == naive.greedy(prompts()[2], 4, base=subject.model)


@pytest.mark.parametrize("width", [32, 160])  # 160: more than one tile of rows, and tails of tiles
def test_an_answer_has_the_same_bits_whatever_runs_beside_it(width):
    """Float32: alone, among others, in chunks, thrown out and computed again, behind a prefix that another left."""
    base = model(dim=width, ffn_dim=88, windows=(7, 0))
    lora = LoRA.create(base, LoRAConfig(rank=4, targets="all-linear"), seed=3).requires_grad_(False).eval()
    for path in lora.paths:
        lora.pair(path)[1].normal_(0, 0.3, generator=torch.Generator().manual_seed(5))
    asked = [
        request(f"r{i}", ids, "a" if i % 3 == 2 else None, max_tokens=9, ignore_eos=True, temperature=1.0, seed=i)
        for i, ids in enumerate(prompts()[:18])
    ]

    def answered(groups, **settings):
        subject = compiled(model=base, **settings)
        subject.add_adapter("a", lora)
        answers = [answer for group in groups for answer in subject.generate(group)]
        return [(answer.token_ids, answer.logprobs) for answer in answers]

    alone = answered([[one] for one in asked], prefix_reuse=False)
    assert answered([asked], max_batch=18) == alone
    assert answered([asked[i : i + 3] for i in range(0, 18, 3)]) == alone
    assert answered([asked], step_tokens=8, max_batch=5, block_size=8) == alone
    assert answered([asked], kv_tokens=96, block_size=4) == alone


def test_a_list_of_questions_waits_for_the_compiled_form():
    subject = engine()
    subject.generate([request("r", prompts()[0], max_tokens=40, ignore_eos=True)])
    assert subject.is_compiled
