"""Texts read word by word against the library that reads them whole, and forms of rows against rendered rows."""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from prairie.data.builtin_templates import AS_SAID, BUILTIN
from prairie.data.chat_template import ChatTemplate, Dialogue
from prairie.data.loader import TokenDataset
from prairie.data.records import Chat, Message
from prairie.data.tokenizer import PRETOKENIZE, Tokenizer
from prairie.data.words import EXPRESSIONS, cuts_at_spaces
from prairie.errors import TemplateError

CORPUS = [
    "Once upon a time there was a little girl named Lily. She liked to play outside in the park.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(12, 345))  # it's   done",
    "学而时习之，不亦说乎？ 有朋自远方来",
] * 5
EDGES = [
    "a",
    "B",
    "é",
    "e\u0301",
    "\u0301",
    "9",
    "零",
    "学",
    "カ",
    "!",
    "'",
    "'s",
    "\n",
    "\r\n",
    "\t",
    "\x1c",
    "\x85",
    "\xa0",
]
EDGES += ["\u180e", "\u200b", "\u2028", "\u3000", "🙂", "\x00", "_", " ", "  ", "▁", "/", "<|im_end|>"]
WILD = st.lists(st.sampled_from([*EDGES, " ", " ", "the", "upon"]) | st.text(max_size=3), max_size=12).map("".join)


def bpe(pre_tokenizer: Any, normalizer: Any = None, decoder: Any = None) -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(unk_token=None))
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.decoder = decoder or decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if decoder is None else sorted(set("".join(CORPUS) + "▁"))
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    texts = CORPUS if decoder is None else [word for text in CORPUS for word in text.split(" ")]
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(json.loads(backend.to_str()), {"eos_token": "<|endoftext|>"})


def split(expression: str, more: Any = None) -> Any:
    steps = [pre_tokenizers.Split(tokenizers.Regex(expression), "isolated")]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def all_kinds() -> dict[str, Tokenizer]:
    found = {f"expression {i}": bpe(split(e)) for i, e in enumerate(sorted({*EXPRESSIONS, PRETOKENIZE}))}
    found["GPT-2"] = bpe(pre_tokenizers.ByteLevel(add_prefix_space=False))
    found["a space before"] = bpe(pre_tokenizers.ByteLevel(add_prefix_space=True), normalizers.NFC())
    pieces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    found["Llama 2"] = bpe(None, normalizers.Sequence(pieces), decoders.Sequence([decoders.Replace("▁", " ")]))
    return found


KINDS = all_kinds()


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_what_the_whole_text_is(kind):
    tokenizer = KINDS[kind]
    assert tokenizer._words_at("start") is not None, "this kind is read word by word"
    pairs = [f"x{a} {b}y" for a, b in itertools.product(EDGES, EDGES)] + [f"{a}{b} " for a in EDGES for b in EDGES]

    @given(st.lists(WILD, min_size=1, max_size=5))
    @settings(max_examples=60, deadline=None)
    def same(texts):
        for place in ("start", "after_special", "after_text"):
            assert tokenizer.encode_batch(texts, place=place) == tokenizer._encode_whole(texts, place)

    same()
    for place in ("start", "after_text"):
        assert tokenizer.encode_batch(pairs, place=place) == tokenizer._encode_whole(pairs, place)


def test_what_is_not_known_is_read_whole():
    spec = copy.deepcopy(KINDS["GPT-2"]._spec)
    assert cuts_at_spaces(spec)
    for change in (
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"\w+ \w+"}, "behavior": "Isolated", "invert": False}},
        {"normalizer": {"type": "Replace", "pattern": {"String": "a b"}, "content": "c"}},
        {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
        {"added_tokens": [{"id": 9, "content": "New York", "special": False}]},
        {"added_tokens": [{"id": 9, "content": "York", "special": False, "lstrip": True}]},
        {"model": spec["model"] | {"dropout": 0.1}},
        {"model": {"type": "Unigram", "vocab": []}},
    ):
        assert not cuts_at_spaces(spec | change), change
    pieces = copy.deepcopy(KINDS["Llama 2"]._spec)
    assert cuts_at_spaces(pieces)
    pieces["model"]["vocab"]["of▁the"] = 399
    assert not cuts_at_spaces(pieces)


def test_what_is_remembered_is_forgotten_before_it_fills_memory(monkeypatch):
    from prairie.data import words

    tokenizer = bpe(pre_tokenizers.ByteLevel(add_prefix_space=False))
    monkeypatch.setattr(words, "KEPT", 100)
    texts = [f"word{i} again and{i} again" for i in range(40)]
    for text in texts:
        assert tokenizer.encode(text) == tokenizer._encode_whole([text], "start")[0]
    assert tokenizer._words_at("start")._size < 300


TURNS = st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), WILD), min_size=1, max_size=4)


def with_template(name: str) -> ChatTemplate:
    return ChatTemplate.builtin(name, KINDS["GPT-2"])


@pytest.mark.parametrize("name", [name for name, source in BUILTIN.items() if source in AS_SAID])
def test_filled_rows_are_rendered_rows(name):
    template = with_template(name)
    filled_rows = 0

    @given(TURNS)
    @settings(max_examples=100, deadline=None)
    def same(turns):
        nonlocal filled_rows
        dialogue = Dialogue(tuple(Message(role, said) for role, said in turns))
        filled = template.fill([dialogue, dialogue])
        if filled.numbers:
            assert [filled.row(0)] == [filled.row(1)] == template.encode_rows([dialogue])[0]
            filled_rows += 1

    same()
    assert filled_rows > 5
    marked = Dialogue((Message("user", "a <|im_end|> b"), Message("assistant", "yes")))
    thought = Dialogue((Message("user", "a"), Message("assistant", "yes", reasoning="why")))
    assert template.fill([marked, thought]).numbers == []


def test_a_dataset_of_both_kinds_of_rows_keeps_their_order():
    template = with_template("chatml")
    said = ["Once upon a time", "a < b", "in the park", "<think>no</think>", "long " * 40, "the girl"]
    chats = [Chat((Message("user", f"{i}?"), Message("assistant", text)), weight=i + 1) for i, text in enumerate(said)]
    chats.insert(2, Chat((Message("user", "nobody answers"),)))
    for on_long in ("refuse", "truncate"):
        dataset = TokenDataset.from_chats(chats, template, 40, on_long=on_long)
        wanted, weights, refused = [], [], []
        for number, chat in enumerate(chats):
            try:
                (row,) = template.encode_rows([Dialogue(chat.messages)])[0]
            except TemplateError:  # pragma: no cover
                raise
            if any(row.mask) and (len(row.ids) <= 40 or on_long == "truncate"):
                wanted.append((row.ids[:40], row.mask[:40]))
                weights.append(chat.weight)
            else:
                refused.append(number)
        found = [(ids.tolist(), mask.tolist()) for ids, mask in map(dataset.row, range(len(dataset)))]
        assert found == wanted and dataset.weights is not None and dataset.weights.tolist() == weights
        assert [row["row"] for row in dataset.figures["refused"]] == refused
