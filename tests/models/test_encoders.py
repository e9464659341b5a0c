"""Encoders against transformers: packed rows of unlike length against padded ones, every head, the way back."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prairie.errors import ModelError
from prairie.models.config import ModelConfig
from prairie.models.families import FAMILIES
from prairie.models.transformer import Transformer
from prairie.models.weights import load_model, save_model
from prairie.ops.attention import PackedDocuments

transformers = pytest.importorskip("transformers")

LENGTHS = [7, 3, 33, 1, 12]
VOCABULARY = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64, "num_labels": 3,
}  # fmt: skip
SMALL = {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "num_labels": 3}
MARKS = {"pad_token_id": 1, "bos_token_id": 3, "eos_token_id": 2, "cls_token_id": 3, "sep_token_id": 2}
MODERN = {**SIZES, **MARKS, "local_attention": 8}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", SIZES),
    "bert, another activation": ("Bert", {**SIZES, "hidden_act": "gelu_new", "type_vocab_size": 3}),
    "roberta": ("Roberta", {**SIZES, "layer_norm_eps": 1e-5, "type_vocab_size": 1}),
    "distilbert": ("DistilBert", {**SMALL, "max_position_embeddings": 64}),
    "modernbert": ("ModernBert", MODERN),
    "modernbert with every bias": (
        "ModernBert",
        {**MODERN, "norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True,
         "decoder_bias": False, "classifier_pooling": "mean", "global_attn_every_n_layers": 2},
    ),
}  # fmt: skip
KINDS = {"Model": "", "ForMaskedLM": "mlm", "ForSequenceClassification": "classify", "ForTokenClassification": "tag"}


@functools.cache
def peer_of(case: str, kind: str) -> Any:
    """A random model, its biases and norms too."""
    family, settings = CASES[case]
    torch.manual_seed(0)
    peer = getattr(transformers, family + kind)(getattr(transformers, f"{family}Config")(**settings)).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return peer


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("encoders")


def folder_of(case: str, kind: str, root: Path) -> Path:
    folder = root / f"{case} {kind}"
    if not folder.exists():
        peer_of(case, kind).save_pretrained(folder)
    return folder


def rows(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def padded() -> dict[str, Tensor]:
    ids_BT = torch.nn.utils.rnn.pad_sequence(rows(), batch_first=True, padding_value=1)
    mask_BT = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return {"input_ids": ids_BT, "attention_mask": mask_BT.long()}


def hidden(model: Transformer) -> Tensor:
    return model(torch.cat(rows()), PackedDocuments(LENGTHS))


def ours_and_theirs(model: Transformer, kind: str, theirs: Any) -> tuple[Tensor, Tensor]:
    real_BT = padded()["attention_mask"].bool()
    match KINDS[kind]:
        case "mlm":
            return model.logits(hidden(model)), theirs.logits[real_BT]
        case "classify":
            return model.scores(hidden(model), LENGTHS), theirs.logits
        case "tag":
            return model.scores(hidden(model), LENGTHS), theirs.logits[real_BT]
    return hidden(model), theirs.last_hidden_state[real_BT]


def close(ours: Tensor, theirs: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-4)


def test_every_family_of_encoders_has_a_case() -> None:
    assert {getattr(transformers, f"{CASES[case][0]}Config").model_type for case in CASES} == {
        name for name, family in FAMILIES.items() if family.heads
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_outputs_equal_transformers_there_and_back(case: str, kind: str, root: Path) -> None:
    """33 tokens against a window of 4 on each side (ModernBERT)."""
    folder, theirs = folder_of(case, kind, root), peer_of(case, kind)(**padded())
    model = load_model(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == model.config.parameters()
    ours, wanted = ours_and_theirs(model, kind, theirs)
    assert wanted.abs().max() > 0.2
    close(ours, wanted)
    if getattr(theirs, "pooler_output", None) is not None:
        close(model.scores(hidden(model), LENGTHS), theirs.pooler_output)
    saved = save_model(model, folder / "again")
    again, loading = type(peer_of(case, kind)).from_pretrained(folder / "again", output_loading_info=True)
    assert not any(loading.values())
    close(ours, ours_and_theirs(model, kind, again.eval()(**padded()))[1])
    once_more = load_model(folder / "again")
    assert once_more.config == model.config and once_more.loaded_hashes is not None
    assert once_more.loaded_hashes[0] == saved


@pytest.mark.parametrize("case", ["bert", "roberta", "distilbert", "modernbert"])
def test_gradients_equal_transformers(case: str, root: Path) -> None:
    """Of the loss of masked tokens, for every weight."""
    model, peer = load_model(folder_of(case, "ForMaskedLM", root)), peer_of(case, "ForMaskedLM")
    labels_N = torch.full((sum(LENGTHS),), -100)
    labels_N[::3] = torch.cat(rows(1))[::3]
    labels_BT = torch.full_like(padded()["input_ids"], -100)
    labels_BT[padded()["attention_mask"].bool()] = labels_N
    peer.zero_grad()
    peer(**padded(), labels=labels_BT).loss.backward()
    (model.cross_entropy(hidden(model), labels_N) / (labels_N != -100).sum()).backward()
    theirs, ours = dict(peer.named_parameters()), dict(model.named_parameters())
    compared = 0
    for weight in model.table:
        if weight.name in theirs:
            gradient = ours[weight.parameter].grad
            close(weight.take(gradient), theirs[weight.name].grad)
            compared += 1
    assert compared == len({id(parameter) for parameter in peer.parameters()})


@torch.no_grad()
def test_pairs_of_texts(root: Path) -> None:
    """Each token's segment counts."""
    model, peer = load_model(folder_of("bert", "Model", root)), peer_of("bert", "Model")
    ids_T, segments_T = rows()[2], (torch.arange(33) > 20).long()
    theirs = peer(input_ids=ids_T[None], token_type_ids=segments_T[None]).last_hidden_state[0]
    close(model(ids_T, PackedDocuments([33]), segments_N=segments_T), theirs)
    assert not torch.allclose(model(ids_T, PackedDocuments([33])), theirs, atol=1e-2)


@torch.no_grad()
def test_files_of_other_makes(root: Path, tmp_path: Path) -> None:
    """Names of 2019 (gamma, beta), with and without the prefix, a file without a pooler, second copies of weights."""
    folder = folder_of("bert", "Model", root)
    wanted = hidden(load_model(folder))
    state = load_file(folder / "model.safetensors")

    def written(tensors: dict[str, Tensor]) -> Transformer:
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
        return load_model(tmp_path)

    old = {k.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): v for k, v in state.items()}
    old["embeddings.position_ids"] = torch.arange(64)[None]
    close(hidden(written(old)), wanted)
    close(hidden(written({f"bert.{name}": tensor for name, tensor in state.items()})), wanted)
    bare = written({name: tensor for name, tensor in state.items() if "pooler" not in name})
    close(hidden(bare), wanted)
    with pytest.raises(ModelError, match="gives no scores"):
        bare.scores(wanted, LENGTHS)

    folder = folder_of("bert", "ForMaskedLM", root)
    state = load_file(folder / "model.safetensors")
    state["cls.predictions.decoder.weight"] = state["bert.embeddings.word_embeddings.weight"].clone()
    state["cls.seq_relationship.weight"] = torch.zeros(2, 32)
    assert written(state).config.head.kind == "mlm"
    state["cls.predictions.decoder.weight"] += 1
    with pytest.raises(ModelError, match="tied"):
        written(state)


@pytest.mark.parametrize("case", ["bert", "roberta", "distilbert", "modernbert"])
@torch.no_grad()
def test_a_body_gets_another_head(case: str, root: Path) -> None:
    body = load_model(folder_of(case, "Model", root))
    scored = body.with_scores(("low", "high"), seed=1)
    assert scored.scores(hidden(scored), LENGTHS).shape == (len(LENGTHS), 2)
    assert scored.embed is body.embed and scored.config.labels == ("low", "high")
    close(hidden(scored), hidden(body))
    assert scored.with_head("tag", ["a"]).scores(hidden(scored), LENGTHS).shape == (sum(LENGTHS), 1)
    masked = body.with_head("mlm", seed=2)
    assert masked.logits(hidden(masked)).shape == (sum(LENGTHS), VOCABULARY)
    if case == "bert":
        assert scored.task.dense is body.task.dense, "the pooler is kept"


def test_what_a_model_does_not_have_is_refused(root: Path) -> None:
    bare = load_model(folder_of("distilbert", "Model", root))
    with pytest.raises(ModelError, match="no logits of tokens: got an encoder"):
        bare.logits(torch.zeros(1, 32))
    with pytest.raises(ModelError, match="only an encoder-decoder"):
        bare.encode(torch.tensor([5]), PackedDocuments([1]))
    with pytest.raises(ModelError, match="no head of that kind: got pool, wanted one of mlm, classify, tag"):
        bare.with_head("pool")
    with pytest.raises(ModelError, match="no other model can use it"):
        bare(torch.tensor([5]), PackedDocuments([1]), memory=object())  # type: ignore[arg-type]


def test_encoders_of_our_own_are_made_from_a_seed() -> None:
    config = ModelConfig(
        vocab_size=50, dim=16, layers=2, heads=2, kv_heads=2, ffn_dim=32, family="bert", causal=False, norm="layer",
        norm_bias=True, norm_at="sum", embed_norm=True, final_norm=False, positions="learned", segments=2, gated=False,
        activation="gelu", qkv_bias=True, o_bias=True, mlp_bias=True, max_context=32,
    )  # fmt: skip
    model = Transformer(config).init_weights(0).with_head("mlm", seed=0)
    tokens_N = torch.arange(12)
    loss = model.cross_entropy(model(tokens_N, PackedDocuments([5, 7])), tokens_N)
    assert 2.0 < float(loss.detach()) / 12 < 8.0
    loss.backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if name != "segments_bias")
