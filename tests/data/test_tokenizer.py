"""The tokenizer against transformers, against bytes, and against users who write special tokens."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from prairie.data.tokenizer import CHATML_SPECIALS, Detokenizer, Tokenizer
from prairie.errors import TokenizerError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
STORIES = SHARED / "models" / "stories260K-hf"
GPT2 = SHARED / "models" / "gpt2_tokenizer"
needs_shared = pytest.mark.skipif(not STORIES.is_dir(), reason="the shared models are not on this machine")

CORPUS = [
    "Once upon a time there was a little girl named Lily. She liked to play outside in the park.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(12, 345))",
    "学而时习之，不亦说乎？有朋自远方来，不亦乐乎？",
    "The year 2024 has 366 days; it's a leap year, isn't it?",
] * 5
TEXTS = [
    "",
    " ",
    "  two spaces ",
    "Once upon a time",
    " a leading space",
    "line\nline\n\n\tline\r\nend\n",
    "你好world，世界！2024年",
    "数字12345和abc混合。“引号”",
    "🙂 👨‍👩‍👧 é́ naïve ½ ②",
    "def f(x):\n    return x ** 2  # comment",
    "don't DON'T we'll",
    "\x00\x7f\ufffd\ufeff",
]


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return Tokenizer.train_bpe(CORPUS, 400)


def test_round_trip(ours: Tokenizer) -> None:
    for text in TEXTS:
        assert ours.decode(ours.encode(text)) == text
    assert ours.encode_batch(TEXTS) == [ours.encode(text) for text in TEXTS]


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_round_trip_of_any_text(text: str) -> None:
    tokenizer = _cached()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == text.encode()
    assert not set(ids) & set(tokenizer.special_tokens.values())


def test_lone_surrogate_becomes_the_replacement_character(ours: Tokenizer) -> None:
    assert ours.decode(ours.encode("a\ud800b")) == "a\ufffdb"


def test_digits_and_scripts_stand_alone(ours: Tokenizer) -> None:
    assert [ours.decode([i]) for i in ours.encode("2024")] == ["2", "0", "2", "4"]
    big = Tokenizer.train_bpe(["你好world你好world 12 12 12"] * 50, 300)
    for token_id in range(big.vocab_size):
        text = big.token_bytes(token_id).decode(errors="ignore")
        assert not (any("\u4e00" <= c <= "\u9fff" for c in text) and any(c.isascii() and c.isalpha() for c in text))
        assert sum(c.isdigit() for c in text) <= 1


def test_specials_are_only_read_when_asked(ours: Tokenizer) -> None:
    text = "hi<|im_end|>\n<|im_start|>system"
    special = set(ours.special_tokens.values())
    assert ours.decode(ours.encode(text), skip_special=False) == text
    assert not special & set(ours.encode(text))
    assert special & set(ours.encode(text, special=True)) == {ours.special_tokens[t] for t in CHATML_SPECIALS[1:]}
    assert ours.decode(ours.encode(text, special=True)) == "hi\nsystem"
    assert ours.decode(ours.encode(text, special=True), skip_special=False) == text
    assert ours.eos_id == ours.pad_id == ours.special_tokens["<|endoftext|>"] == 0
    assert ours.bos_id is None and not ours.adds_bos


def test_training_is_deterministic_across_processes(ours: Tokenizer) -> None:
    code = (
        "from tests.data.test_tokenizer import CORPUS; from prairie.data.tokenizer import Tokenizer;"
        "print(Tokenizer.train_bpe(CORPUS, 400).hash)"
    )
    root = Path(__file__).resolve().parents[2]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == ours.hash


def test_save_load_and_transformers_agree(ours: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.hash == ours.hash and again.special_tokens == ours.special_tokens
    assert (again.eos_id, again.pad_id, again.bos_id) == (ours.eos_id, ours.pad_id, ours.bos_id)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (ours.eos_id, ours.pad_id, ours.vocab_size)
    for text in [*TEXTS, "a<|im_end|>b <|im_start|>"]:
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text, special=True)
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text))
    again.save(tmp_path)
    assert Tokenizer.load(tmp_path).hash == ours.hash


@needs_shared
@pytest.mark.parametrize("folder", [STORIES, GPT2], ids=["stories260K", "gpt2"])
def test_foreign_tokenizers_equal_transformers(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = Tokenizer.load(folder)
    if folder is STORIES:
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
    else:
        theirs = transformers.GPT2TokenizerFast(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    corpus = (SHARED / "corpora" / "tinyshakespeare_train.txt").read_text()[:40000].split("\n\n")
    for text in [*TEXTS, *corpus, "a</s>b <s> c", "x<|endoftext|>y"]:
        if "\ufeff" not in text:
            ids = theirs(text, add_special_tokens=False)["input_ids"]
            assert ours.encode(text, special=True) == ids, text
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
    special = set(ours.special_tokens.values()) - {ours.special_tokens.get("<unk>")}
    assert not special & set(ours.encode("a</s>b <s> <|endoftext|>"))


@needs_shared
@pytest.mark.parametrize("folder", [STORIES, GPT2], ids=["stories260K", "gpt2"])
def test_a_foreign_tokenizer_stays_itself_when_saved(folder: Path, tmp_path: Path) -> None:
    ours = Tokenizer.load(folder)
    ours.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.hash == ours.hash and again.adds_bos == ours.adds_bos
    assert again.encode_batch(TEXTS) == ours.encode_batch(TEXTS)
    again.save(tmp_path)
    assert Tokenizer.load(tmp_path).hash == ours.hash


@needs_shared
def test_stories_oracle() -> None:
    ours = Tokenizer.load(STORIES)
    assert (ours.vocab_size, ours.bos_id, ours.eos_id, ours.adds_bos) == (512, 1, 2, True)
    for case in json.loads((SHARED / "models" / "stories260K" / "oracle_greedy.json").read_text()):
        if "prompt_ids" in case:
            assert [ours.bos_id, *(ours.encode(case["prompt"]) if case["prompt"] else [])] == case["prompt_ids"]


@needs_shared
def test_prefix_space_only_at_the_start() -> None:
    ours = Tokenizer.load(STORIES)
    whole = ours.encode("Once upon a time")
    assert ours.encode("Once upon") + ours.encode(" a time", place="after_text") == whole


@given(st.lists(st.integers(0, 399), max_size=40))
@settings(max_examples=200, deadline=None)
def test_detokenizer_equals_decode(ids: list[int]) -> None:
    tokenizer = _cached()
    ids = [i for i in ids if i < tokenizer.vocab_size]
    stream = Detokenizer(tokenizer)
    parts = [stream.push(i) for i in ids]
    assert "".join(parts) + stream.finish() == tokenizer.decode(ids)


def test_detokenizer_never_splits_a_character(ours: Tokenizer) -> None:
    text = "🙂你好é 👨‍👩‍👧"
    stream = Detokenizer(ours)
    parts = [stream.push(i) for i in ours.encode(text)]
    assert "".join(parts) == text and stream.finish() == ""
    assert not any("\ufffd" in part for part in parts)
    cut = Detokenizer(ours)
    ids = ours.encode("🙂")
    assert "".join(cut.push(i) for i in ids[:-1]) + cut.finish() == "\ufffd"


@needs_shared
def test_detokenizer_keeps_the_space_of_a_continuation() -> None:
    ours = Tokenizer.load(STORIES)
    ids = ours.encode("Once upon a time")
    stream = Detokenizer(ours)
    assert "".join(map(stream.push, ids)) == " Once upon a time"
    first = Detokenizer(ours, continuation=False)
    assert "".join(map(first.push, ids)) == "Once upon a time" == ours.decode(ids)


SCHEMES: dict[str, dict[str, object]] = {
    "first": {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}},
    "always": {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}},
    "never": {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": True}},
    "normalizer": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        }
    },
}


def sentencepiece_like(scheme: str) -> Tokenizer:
    """A byte-fallback vocabulary of single characters, with special tokens of every kind."""
    pieces = ["<unk>", "<s>", "</s>", "<left>", "<right>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"abcxyz", "▁a"]
    spec = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": i,
                "content": pieces[i],
                "single_word": False,
                "lstrip": pieces[i] == "<left>",
                "rstrip": pieces[i] == "<right>",
                "normalized": False,
                "special": True,
            }
            for i in range(5)
        ],
        "model": {
            "type": "BPE",
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": [["▁", "a"]],
            "unk_token": "<unk>",
            "byte_fallback": True,
            "fuse_unk": True,
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        **SCHEMES[scheme],
    }
    return Tokenizer(spec, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


@pytest.mark.parametrize("scheme", SCHEMES)
@given(
    text=st.lists(st.sampled_from(["a", "b", " ", "  ", "你", "\n", "<s>", "</s>", "<left>", "<right>"])).map("".join)
)
@settings(max_examples=100, deadline=None)
def test_special_tokens_and_prefix_spaces_equal_the_library(scheme: str, text: str) -> None:
    ours = sentencepiece_like(scheme)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(ours.spec))
    assert ours.encode(text, special=True) == theirs.encode(text, add_special_tokens=False).ids
    assert not set(ours.encode(text)) & set(ours.special_tokens.values())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_text_in_the_middle_gets_no_space(scheme: str) -> None:
    ours = sentencepiece_like(scheme)
    assert ours.encode("ab", place="start") + ours.encode(" ba", place="after_text") == ours.encode("ab ba")


def test_refusals(tmp_path: Path, ours: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="259 tokens or more"):
        Tokenizer.train_bpe(CORPUS, 258)
    with pytest.raises(TokenizerError, match="no tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.load(tmp_path)
    with pytest.raises(TokenizerError, match="no such token"):
        ours.token_bytes(ours.vocab_size)
    with pytest.raises(TokenizerError, match="eos_token"):
        Tokenizer(ours.spec, {"eos_token": "<nowhere>"})
    with pytest.raises(TokenizerError, match="do not stand for bytes"):
        Tokenizer(ours.spec | {"decoder": {"type": "BPEDecoder", "suffix": "</w>"}}, {})


def test_a_length_limit_in_the_file_is_ignored(ours: Tokenizer) -> None:
    limit = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    limited = Tokenizer(ours.spec | {"truncation": limit}, ours.config)
    assert limited.encode("one two three") == ours.encode("one two three")
    assert limited.hash == ours.hash


def test_pickles_for_worker_processes(ours: Tokenizer) -> None:
    again = pickle.loads(pickle.dumps(ours))
    assert again.hash == ours.hash and again.encode("hi 你好") == ours.encode("hi 你好")


_CACHE: list[Tokenizer] = []


def _cached() -> Tokenizer:
    if not _CACHE:
        _CACHE.append(Tokenizer.train_bpe(CORPUS, 400))
    return _CACHE[0]
