"""Encoder-decoders against transformers' own models: logits, gradients, distances beyond the furthest, the way back."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prairie.errors import ModelError
from prairie.models.families import FAMILIES
from prairie.models.transformer import Transformer
from prairie.models.weights import load_model, save_model
from prairie.ops.attention import PackedDocuments
from prairie.ops.cross_attention import Memory

transformers = pytest.importorskip("transformers")

SOURCES, TARGETS = [7, 3, 90, 1, 12], [4, 9, 1, 80, 6]
VOCABULARY = 97
T5 = {
    "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 2,
    "num_heads": 4, "decoder_start_token_id": 0, "relative_attention_max_distance": 40,
}  # fmt: skip
BART = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 8, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40, "max_position_embeddings": 128,
    "pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 0, "decoder_start_token_id": 2,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", {**T5, "feed_forward_proj": "relu"}),
    "t5 gated": ("T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "t5 gated by silu": ("T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-silu"}),
    "bart": ("BartForConditionalGeneration", BART),
    "bart scaled": ("BartForConditionalGeneration", {**BART, "scale_embedding": True, "forced_bos_token_id": 7}),
    "marian": ("MarianMTModel", {**BART, "scale_embedding": True, "bad_words_ids": [[1]]}),
    "marian, another activation": ("MarianMTModel", {**BART, "activation_function": "swish"}),
}


@functools.cache
def peer_of(case: str) -> Any:
    name, settings = CASES[case]
    torch.manual_seed(0)
    config = getattr(transformers, name.replace("ForConditionalGeneration", "").replace("MTModel", "") + "Config")
    peer = getattr(transformers, name)(config(**settings)).eval()
    with torch.no_grad():
        for tensor in (*peer.parameters(), *peer.buffers()):
            if tensor.requires_grad or tensor.shape == (1, VOCABULARY):  # waves stay; biases of logits are a buffer
                tensor.add_(torch.randn_like(tensor) * 0.1)
    return peer


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("encoder-decoders")


def folder_of(case: str, root: Path) -> Path:
    folder = root / case
    if not folder.exists():
        peer_of(case).save_pretrained(folder)
    return folder


def rows(lengths: list[int], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, VOCABULARY, (length,), generator=generator) for length in lengths]


def padded(lengths: list[int], seed: int, prefix: str = "") -> dict[str, Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(rows(lengths, seed), batch_first=True, padding_value=1)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask.long()}


def theirs(peer: Any, **more: Any) -> Any:
    return peer(**padded(SOURCES, 1), **padded(TARGETS, 2, "decoder_"), **more)


def hidden(model: Transformer) -> Tensor:
    read = model.encode(torch.cat(rows(SOURCES, 1)), PackedDocuments(SOURCES))
    return model(torch.cat(rows(TARGETS, 2)), PackedDocuments(TARGETS), memory=Memory(read, SOURCES, TARGETS))


def close(ours: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)


REAL = torch.arange(max(TARGETS)) < torch.tensor(TARGETS)[:, None]


def test_every_family_of_encoder_decoders_has_a_case() -> None:
    assert {peer_of(case).config.model_type for case in CASES} == {
        name for name, family in FAMILIES.items() if family.encoder_names is not None
    }


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_equal_transformers_there_and_back(case: str, root: Path) -> None:
    """T5: 90 tokens where all distances beyond 40 are alike."""
    folder, peer = folder_of(case, root), peer_of(case)
    wanted = theirs(peer).logits[REAL]
    model = load_model(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == model.config.parameters()
    ours = model.logits(hidden(model))
    assert wanted.abs().max() > 0.5
    close(ours, wanted)
    save_model(model, folder / "again")
    again, loading = type(peer).from_pretrained(folder / "again", output_loading_info=True)
    assert not any(loading.values())
    close(ours, theirs(again.eval()).logits[REAL])
    for rule in ("forced_bos_token_id", "bad_words_ids", "decoder_start_token_id"):
        assert getattr(again.generation_config, rule) == getattr(peer.generation_config, rule)
    assert load_model(folder / "again").config == model.config


@pytest.mark.parametrize("case", ["t5", "t5 gated", "bart", "marian"])
def test_gradients_equal_transformers(case: str, root: Path) -> None:
    model, peer = load_model(folder_of(case, root)), peer_of(case)
    labels_N = torch.cat(rows(TARGETS, 3))
    labels_N[::4] = -100
    labels_BT = torch.full(REAL.shape, -100)
    labels_BT[REAL] = labels_N
    peer.zero_grad()
    theirs(peer, labels=labels_BT).loss.backward()
    (model.cross_entropy(hidden(model), labels_N) / (labels_N != -100).sum()).backward()
    named, ours = dict(peer.named_parameters()), dict(model.named_parameters())
    compared = 0
    for weight in model.table:
        if weight.name in named:
            gradient = ours[weight.parameter].grad
            close(weight.take(gradient), named[weight.name].grad)
            compared += 1
    assert compared == len({id(parameter) for parameter in peer.parameters() if parameter.requires_grad})


@torch.no_grad()
def test_t5_has_a_matrix_of_its_own_if_the_file_holds_one(root: Path, tmp_path: Path) -> None:
    """Whatever config.json says: transformers 5 writes that it is tied."""
    folder = folder_of("t5 gated", root)
    state = load_file(folder / "model.safetensors")
    save_file({**state, "lm_head.weight": state["shared.weight"].flip(0)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    model = load_model(tmp_path)
    peer = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    close(model.logits(hidden(model)), theirs(peer).logits[REAL])
    assert not model.config.tie_embeddings and load_model(folder).config.tie_embeddings
    save_model(model, tmp_path / "again")
    assert load_model(tmp_path / "again").config == model.config


def test_a_decoder_without_what_the_encoder_read_is_refused(root: Path) -> None:
    model = load_model(folder_of("t5", root))
    with pytest.raises(ModelError, match="needs what the encoder read"):
        model(torch.tensor([5]), PackedDocuments([1]))
    with pytest.raises(ValueError, match="2 rows cannot look at 1"):
        Memory(torch.zeros(3, 32), [3], [1, 1])
