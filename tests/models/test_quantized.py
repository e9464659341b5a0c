"""Quantised models: less memory, a measured change of the answers, and adapters that learn on them (QLoRA)."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from test_families import folder_of, root, tokens_of  # noqa: F401 - a fixture

from prairie.engine.language_model import LanguageModel
from prairie.errors import AdapterError, ModelError
from prairie.models.config import ModelConfig
from prairie.models.lora import AdapterRows, LoRA, LoRAConfig
from prairie.models.quantized import bytes_of, quantize
from prairie.models.transformer import Transformer
from prairie.models.weights import hash_of, load_model, save_model
from prairie.ops.attention import PackedDocuments

BITS = ["int8", "int4", "nf4"]
STORIES = Path(__file__).parents[2].parent / "shared" / "data" / "models" / "stories260K-hf"
CONFIG = ModelConfig(60, 128, 3, 4, 2, 256, qkv_bias=True, family="qwen2")
SAMPLE = [torch.randint(60, (20,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(3)]


def model() -> Transformer:
    return Transformer(CONFIG).init_weights(1)


def logits(model: Transformer, row: list[int], *adapters: AdapterRows) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(torch.tensor(row), PackedDocuments([len(row)]), adapters), adapters)


def dense_again(quantized: Transformer) -> Transformer:
    """A plain model of the weights that a quantised one computes with."""
    plain = model()
    with torch.no_grad():
        for theirs, ours in zip(quantized.linears(), plain.linears(), strict=True):
            ours.dense().copy_(theirs.dense())
    return plain


@pytest.mark.parametrize("bits", BITS)
def test_less_memory_and_a_measured_error(bits: str) -> None:
    full, packed = model(), model()
    report = quantize(packed, bits, SAMPLE)
    share = {"int8": 0.30, "int4": 0.20, "nf4": 0.19}[bits]
    embedding = full.embed.nbytes
    assert report.bytes_before == bytes_of(full) and report.bytes_after == bytes_of(packed)
    assert report.bytes_after - embedding < share * (report.bytes_before - embedding)
    measured = max(float((logits(packed, row) - logits(full, row)).abs().max()) for row in SAMPLE)
    assert 0 < measured <= report.max_abs < {"int8": 0.3, "int4": 3.0, "nf4": 3.0}[bits]
    assert 0 <= report.kl < {"int8": 0.01, "int4": 1.0, "nf4": 1.0}[bits] and report.same_argmax > 0.5
    assert report.tokens == 60 + 24 and bits in str(report)
    torch.testing.assert_close(logits(packed, SAMPLE[0]), logits(dense_again(packed), SAMPLE[0]), atol=1e-4, rtol=1e-4)


def test_fewer_bits_are_worse() -> None:
    errors = [quantize(model(), bits, SAMPLE).kl for bits in ("int8", "int4")]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_learns_on_it_as_on_the_dequantised_base(bits: str, dora: bool) -> None:
    packed = model()
    quantize(packed, bits, SAMPLE)
    plain = dense_again(packed).requires_grad_(False)
    config = LoRAConfig(rank=4, alpha=12.0, dora=dora)
    ours = LoRA.create(packed, config, 1)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.05
    theirs = copy.deepcopy(ours)
    theirs.base_hash = None
    tokens = torch.tensor(SAMPLE[0])
    for base, lora in ((packed, ours), (plain, theirs)):
        adapters = [AdapterRows(lora)]
        base.cross_entropy(base(tokens, PackedDocuments([20]), adapters), tokens, adapters).backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-4, rtol=1e-3, msg=name)
    assert not any(name.endswith(".qkv") for name, _ in packed.named_parameters()), "packed weights are no parameters"


def test_it_is_the_same_base_to_an_adapter_and_cannot_be_written(tmp_path: Path) -> None:
    full = model()
    save_model(full, tmp_path / "base")
    lora = LoRA.create(full, LoRAConfig(rank=2))
    packed = load_model(tmp_path / "base")
    quantize(packed, "nf4", SAMPLE)
    assert hash_of(packed) == hash_of(full)
    lora.require_base(packed)
    with pytest.raises(ModelError, match="a model whose weights are packed cannot be written: got nf4"):
        save_model(packed, tmp_path / "again")
    with pytest.raises(AdapterError, match="cannot be merged into a quantised base"):
        lora.merge_into(packed)
    with pytest.raises(ModelError, match="quantised already"):
        quantize(packed, "int8", SAMPLE)
    with pytest.raises(ModelError, match="some tokens"):
        quantize(model(), "int8", [[]])


@pytest.mark.parametrize("case", ["gemma2", "phi3", "gpt2", "gpt-neox", "granite", "mixtral"])
def test_every_family_can_be_quantised(case: str, root: Path) -> None:  # noqa: F811
    packed = load_model(folder_of(case, root))
    report = quantize(packed, "int8", [tokens_of([17]).tolist()])
    assert report.same_argmax > 0.6 and report.bytes_after < report.bytes_before


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs the real model in ../shared/data/models")
def test_the_real_model_still_tells_stories() -> None:
    """The error is small where it should be, and the engine answers with packed weights as the naive loop does."""
    for bits, kl in (("int8", 0.002), ("int4", 0.15), ("nf4", 0.3)):
        told = LanguageModel.load(STORIES, quantize=bits)
        report = told.quantization
        assert report is not None and report.bits == bits and report.kl < kl, report
        text = told.generate_text("Once upon a time", max_tokens=24, temperature=0).text
        assert "there was a" in text
