"""What `prairie.load` gives for models that read: the real MiniLM against its libraries; heads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import prairie
from prairie.cli.main import main
from prairie.engine.reader import Reader
from prairie.errors import ContextLengthError, ModelError, RequestError

transformers = pytest.importorskip("transformers")

TEXTS = [
    "A quick brown fox.",
    "The house is wonderful.",
    "Is it? " * 40,
    "草原上的马在奔跑。 naïve café, 3.5%",
    "🐎",
    "[MASK] and [SEP] are words here",
]


def their_vectors(folder: Path, texts: list[str]) -> Tensor:
    """By transformers alone: the mean of the hidden states, of unit length."""
    tokenizer, model = (getattr(transformers, f"Auto{name}").from_pretrained(folder) for name in ("Tokenizer", "Model"))
    fields = tokenizer(texts, padding=True, return_tensors="pt", split_special_tokens=True)
    with torch.no_grad():
        hidden_BTD = model.eval()(**fields).last_hidden_state
    mask_BT1 = fields["attention_mask"][:, :, None]
    return torch.nn.functional.normalize((hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1), dim=1)


@pytest.fixture(scope="module")
def model(minilm: Path) -> Reader:
    return prairie.load(minilm)


def test_minilm_equals_transformers(model: Reader, minilm: Path) -> None:
    ours, theirs = model.embed(TEXTS[:5]), their_vectors(minilm, TEXTS[:5])
    assert torch.cosine_similarity(ours, theirs).min() > 0.9999
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(model.embed(TEXTS[1]), ours[1:2], atol=1e-5, rtol=1e-4)


def test_minilm_equals_sentence_transformers(model: Reader, minilm: Path) -> None:
    library = pytest.importorskip("sentence_transformers").SentenceTransformer(str(minilm), device="cpu")
    theirs = torch.from_numpy(library.encode(TEXTS[:5]))
    assert torch.cosine_similarity(model.embed(TEXTS[:5]), theirs).min() > 0.9999


def test_minilm_knows_what_is_alike(model: Reader) -> None:
    horse, mare, tax = model.embed(["A horse runs on the meadow.", "A mare gallops over grass.", "Pay your taxes."])
    assert horse @ mare > 0.5 > horse @ tax


def test_special_tokens_in_a_text_are_text(model: Reader) -> None:
    assert model.tokenizer.mask_id not in model.embedder.ids(TEXTS[5])


def test_what_cannot_be_embedded_is_refused(model: Reader) -> None:
    with pytest.raises(RequestError, match="empty"):
        model.embed(["a", ""])
    with pytest.raises(ContextLengthError, match="at most 256"):
        model.embed("word " * 300)
    with pytest.raises(ModelError, match="classifies no texts: got the head pool"):
        model.scores("a")
    assert model.embed([]).shape == (0, 384)


def test_the_terminal_says_that_it_does_not_chat(minilm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["chat", str(minilm), "hello"])
    assert end.value.code == 1
    assert "model reads texts and writes none" in capsys.readouterr().err


def small_bert(folder: Path, kind: str, minilm: Path, **settings: object) -> Path:
    """A small random BERT with the real tokenizer."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, initializer_range=0.4,
        **settings,
    )  # fmt: skip
    getattr(transformers, f"BertFor{kind}")(config).eval().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((minilm / name).read_text())
    return folder


def test_a_classifier_of_texts_and_pairs(tmp_path: Path, minilm: Path) -> None:
    labels = {0: "no", 1: "yes", 2: "maybe"}
    folder = small_bert(tmp_path, "SequenceClassification", minilm, id2label=labels, label2id={})
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    peer = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    model = prairie.load(folder)
    with torch.no_grad():
        for given in ("A quick brown fox.", ("Does it rain?", "It does.")):
            texts = (given,) if isinstance(given, str) else given
            theirs = peer(**tokenizer(*texts, return_tensors="pt")).logits[0]
            [ours] = model.scores([given])
            assert list(ours) == ["no", "yes", "maybe"]
            torch.testing.assert_close(torch.tensor(list(ours.values())), theirs, atol=1e-4, rtol=1e-4)
    with pytest.raises(RequestError, match="nothing to fill"):
        model.fill("a word")


def test_masks_are_filled(tmp_path: Path, minilm: Path) -> None:
    folder = small_bert(tmp_path, "MaskedLM", minilm)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    peer = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    text = "The [MASK] runs over the [MASK]."
    fields = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        probs_TV = peer(**fields).logits[0].softmax(-1)
    places = (fields["input_ids"][0] == tokenizer.mask_token_id).nonzero()[:, 0]
    filled = prairie.load(folder).fill(text, top=3)
    assert len(filled) == 2
    for place, best in zip(places, filled, strict=True):
        values, ids = probs_TV[place].topk(3)
        assert [word for word, _ in best] == [tokenizer.decode([id]).removeprefix("##") for id in ids]
        torch.testing.assert_close(torch.tensor([p for _, p in best]), values, atol=1e-4, rtol=1e-4)


def test_unknown_pooling_is_refused_at_once(tmp_path: Path, minilm: Path) -> None:
    folder = small_bert(tmp_path, "MaskedLM", minilm)
    (folder / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.WordWeights"}]))
    with pytest.raises(ModelError, match="WordWeights"):
        prairie.load(folder)
