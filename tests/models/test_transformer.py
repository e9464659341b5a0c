"""The Transformer against transformers' own models, and packed rows against rows alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from prairie.models.config import ModelConfig
from prairie.models.transformer import Transformer
from prairie.models.weights import load_model, save_model
from prairie.ops.attention import PackedDocuments
from prairie.ops.loss import linear_cross_entropy

transformers = pytest.importorskip("transformers")
STORIES = Path(__file__).parents[3] / "shared/data/models"
HELD_TEXT = (
    "Once upon a time, there was a little girl named Anna. She had a red ball and a small dog. Every day they went to "
    "the park to play. One day the ball rolled under a big tree, and Anna could not reach it.",
    "Tom saw a bird in the garden. The bird was sad because it could not find its nest. Tom wanted to help, so he "
    'looked up at the tall tree and said, "I will find your home." The bird was very happy.',
)
LENGTHS = [7, 19, 1, 12, 19, 33]

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 1000.0,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama without groups": ("Llama", {"num_key_value_heads": 4}),
    "llama one kv head, wide heads": ("Llama", {"num_key_value_heads": 1, "head_dim": 16}),
    "llama with every bias": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3 rope": ("Llama", {"rope_parameters": LLAMA3}),
    "linear rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
}


def peer_of(case: str) -> Any:
    family, changes = CASES[case]
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases of zero and norms of one would hide a mistake
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def pair_of(case: str, folder: Path) -> tuple[Any, Transformer]:
    peer = peer_of(case)
    peer.save_pretrained(folder)
    return peer, load_model(folder)


def tokens_of(lengths: list[int], vocab_size: int = 97) -> torch.Tensor:
    return torch.randint(vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    peer, model = pair_of(case, tmp_path)
    tokens = tokens_of(LENGTHS)
    with torch.no_grad():
        ours = model.logits(model(tokens, PackedDocuments(LENGTHS)))
        theirs = torch.cat([peer(row[None]).logits[0] for row in tokens.split(LENGTHS)])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_transformers(case: str, tmp_path: Path) -> None:
    """Of the mean cross entropy over the supervised tokens of all rows; row 3 and some tokens are not supervised."""
    peer, model = pair_of(case, tmp_path)
    tokens = tokens_of(LENGTHS)
    labels = torch.cat([torch.cat([row[1:], torch.tensor([-100])]) for row in tokens.split(LENGTHS)])
    labels[27:39] = -100
    labels[2] = -100
    count = int((labels != -100).sum())

    loss = linear_cross_entropy(model(tokens, PackedDocuments(LENGTHS)), model.head_weight, labels) / count
    loss.backward()
    theirs = torch.cat([peer(row[None]).logits[0] for row in tokens.split(LENGTHS)])
    their_loss = F.cross_entropy(theirs, labels)
    their_loss.backward()

    assert loss.item() == pytest.approx(their_loss.item(), abs=1e-5)
    wanted = {name: parameter.grad for name, parameter in peer.named_parameters()}
    parameters = dict(model.named_parameters())
    for weight in model.table:
        grad = parameters[weight.parameter].grad
        assert grad is not None
        torch.testing.assert_close(weight.take(grad), wanted[weight.name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", [[5, 5, 5], LENGTHS, [40], [1, 1], [3, 64, 17, 5, 60, 2, 2]])
def test_packed_rows_equal_rows_alone(lengths: list[int]) -> None:
    model = Transformer(ModelConfig(50, 32, 2, 4, 2, 48)).init_weights(5)
    tokens = tokens_of(lengths, 50)
    packed = model(tokens, PackedDocuments(lengths))
    seed = torch.randn(packed.shape, generator=torch.Generator().manual_seed(0))
    (packed * seed).sum().backward()
    packed_grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    alone = torch.cat([model(row, PackedDocuments([len(row)])) for row in tokens.split(lengths)])
    (alone * seed).sum().backward()
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    for ours, parameter in zip(packed_grads, model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["autocast", "bfloat16", "float16"])
@pytest.mark.parametrize("lengths", [[9, 9], LENGTHS])
def test_half_precision_stays_close(mode: str, lengths: list[int]) -> None:
    model = Transformer(ModelConfig(50, 32, 2, 4, 2, 48, qk_norm="head")).init_weights(5)
    tokens = tokens_of(lengths, 50)
    wanted = model(tokens, PackedDocuments(lengths))
    linear_cross_entropy(wanted, model.head_weight, tokens).backward()
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    if mode != "autocast":
        model.to(getattr(torch, mode))
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        got = model(tokens, PackedDocuments(lengths))
        linear_cross_entropy(got, model.head_weight, tokens).backward()
    torch.testing.assert_close(got.float(), wanted, rtol=0.05, atol=0.1)
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert p.grad is not None and grad is not None and p.grad.dtype == p.dtype
        assert torch.nn.functional.cosine_similarity(p.grad.float().flatten(), grad.flatten(), dim=0) > 0.99


def test_saved_model_loads_in_transformers(tmp_path: Path) -> None:
    model = Transformer(ModelConfig(50, 32, 2, 4, 2, 48, bos_id=1, eos_id=2)).init_weights(5)
    save_model(model, tmp_path)
    peer, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = tokens_of([9, 9], 50)
    with torch.no_grad():
        ours = model.logits(model(tokens, PackedDocuments([9, 9])))
        theirs = peer(tokens.view(2, 9)).logits.flatten(0, 1)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(
    not (STORIES / "stories260K-hf").exists(), reason="../shared/data/models is not beside the repository"
)
def test_real_weights_write_the_oracles_stories() -> None:
    model = load_model(STORIES / "stories260K-hf")
    oracle = json.loads((STORIES / "stories260K/oracle_greedy.json").read_text())
    for case in oracle[:4]:
        ids = torch.tensor(case["ids"])
        with torch.no_grad():
            greedy = model.logits(model(ids, PackedDocuments([len(ids)]))).argmax(-1)
        start = len(case["prompt_ids"])
        assert greedy[start - 1 : -1].tolist() == case["ids"][start:]
    scored = oracle[4]
    ids = torch.tensor(scored["ids"])
    with torch.no_grad():
        hidden = model(ids, PackedDocuments([len(ids)]))
        labels = torch.cat([ids[1:], torch.tensor([-100])])
        loss = linear_cross_entropy(hidden, model.head_weight, labels) / (len(ids) - 1)
    torch.testing.assert_close(
        model.logits(hidden)[-1, :8], torch.tensor(scored["last_logits_first8"]), rtol=1e-4, atol=1e-3
    )
    assert abs(float(loss) - scored["loss_per_token"]) < 1e-4


@pytest.mark.skipif(
    not (STORIES / "stories260K-hf").exists(), reason="../shared/data/models is not beside the repository"
)
def test_real_weights_have_transformers_perplexity_on_held_text() -> None:
    """To four digits, on stories the model has not written, as many tokens as its context holds at a time."""
    from prairie.data.tokenizer import Tokenizer

    folder = STORIES / "stories260K-hf"
    model, tokenizer = load_model(folder), Tokenizer.load(folder)
    rows = [tokenizer.encode(text)[: model.config.max_context] for text in HELD_TEXT]
    tokens = torch.tensor([token for row in rows for token in row])
    labels = torch.cat([torch.tensor([*row[1:], -100]) for row in rows])
    with torch.no_grad():
        ours = model.cross_entropy(model(tokens, PackedDocuments([len(row) for row in rows])), labels)
        peer = transformers.AutoModelForCausalLM.from_pretrained(folder)
        theirs = sum(
            F.cross_entropy(peer(torch.tensor([row])).logits[0, :-1], torch.tensor(row[1:]), reduction="sum")
            for row in rows
        )
    count = int((labels != -100).sum())
    assert count > 100
    perplexity = (ours / count).exp().item()
    assert perplexity == pytest.approx((theirs / count).exp().item(), rel=5e-5)
    assert 2 < perplexity < 30, "a story is what this model knows"
