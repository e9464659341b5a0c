"""Cleaning: meaning stays, copies go, and the report accounts for every document."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prairie.data.clean import clean, deduplicate_exact, language, near_duplicates, normalise
from prairie.data.records import Chat, Message, Preference, Text
from prairie.data.sources import read_records

C4 = Path(__file__).resolve().parents[3] / "shared" / "data" / "corpora" / "c4_en_demo.jsonl.gz"


def test_normalise_keeps_meaning() -> None:
    assert normalise("a\r\nb\rc  \n\n\n\n\n\nd\t\n") == "a\nb\nc\n\n\nd"
    assert normalise("\ufeffe\u0301\xa0x\u200b\x00") == "é x"
    code = "def f(x):\n    if x:\n\treturn 1"
    assert normalise(code) == code
    for text in ("全角，ＡＢＣ。", "👨\u200d👩\u200d👧", "  indented"):
        assert normalise(text) == text


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_normalise_is_idempotent(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, how are you?", "latin"),
        ("Où est la bibliothèque ?", "latin"),
        ("学而时习之，不亦说乎？", "zh"),
        ("我用 Python 写程序", "zh"),
        ("これは日本語の文です", "ja"),
        ("Привет, мир", "other"),
        ("12 + 30 = 42", ""),
    ],
)
def test_language(text: str, expected: str) -> None:
    assert language(text) == expected


def test_exact_copies() -> None:
    texts = [Text("Hello  world", "a"), Text("hello world\n", "b"), Text("hello"), Text("world")]
    assert deduplicate_exact(texts) == [texts[0], texts[2], texts[3]]
    q, a, b = Message("user", "q"), Message("assistant", "a"), Message("assistant", "b")
    chats = [Chat((q, a), "x"), Chat((q, a), "y"), Chat((q, b)), Chat((a, q))]
    assert deduplicate_exact(chats) == [chats[0], chats[2], chats[3]]
    pairs = [Preference((q,), (a,), (b,)), Preference((q,), (b,), (a,)), Preference((q,), (a,), (b,), "other")]
    assert deduplicate_exact(pairs) == pairs[:2]


def naive_jaccard(a: str, b: str, size: int = 5) -> float:
    def runs(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}

    return len(runs(a) & runs(b)) / len(runs(a) | runs(b))


def test_near_copies_against_all_pairs() -> None:
    """Every pair found is truly alike, and nearly every text that is like an earlier one is found."""
    draw = random.Random(0)
    words = [f"w{i}" for i in range(500)]
    texts: list[str] = []
    for _ in range(60):
        base = draw.choices(words, k=100)
        texts.append(" ".join(base))
        for changes in (1, 3, 8):
            copy = list(base)
            for place in draw.sample(range(100), changes):
                copy[place] = draw.choice(words)
            texts.append(" ".join(copy))
    found = near_duplicates(texts, threshold=0.7)
    assert all(naive_jaccard(texts[i], texts[j]) >= 0.7 for i, j in found.items())
    kept = [i for i in range(len(texts)) if i not in found]
    like = [(i, j) for n, i in enumerate(kept) for j in kept[:n] if naive_jaccard(texts[i], texts[j]) >= 0.7]
    assert len(like) <= 0.1 * len(found) and len(found) > 60
    assert near_duplicates(texts, threshold=0.7) == found


def test_near_copies_in_chinese_and_of_nothing() -> None:
    poem = "床前明月光，疑是地上霜。举头望明月，低头思故乡。白日依山尽，黄河入海流。欲穷千里目，更上一层楼。"
    assert near_duplicates([poem, "春眠不觉晓，处处闻啼鸟。夜来风雨声", poem + "！", "", "??"]) == {2: 0}


def test_clean_accounts_for_every_document() -> None:
    story = "Once upon a time there was a little girl named Lily who liked to play outside in the big green park."
    texts = [
        Text(story, "s"),
        Text(story.upper()),
        Text(story + " The end"),
        Text("  \n"),
        Text("hi"),
        Text("#$%^&*()!@#$%^&*()"),
        Text("\n".join(["buy now buy now"] * 9)),
        Text("学而时习之，不亦说乎？有朋自远方来，不亦乐乎？"),
        Text("Привет, мир, это проверка языка текста"),
    ]
    kept, report = clean(texts, min_characters=10, languages=["latin", "zh", ""])
    assert [record.text for record in kept] == [story, texts[7].text] and kept[0].source == "s"
    assert report["lost"] == {
        "copies": 1,
        "empty": 1,
        "mostly symbols": 1,
        "near copies": 1,
        "other language": 1,
        "repeats itself": 1,
        "too short": 1,
    }
    assert report["documents"] == 9 == report["kept"] + sum(report["lost"].values())
    assert report["languages"] == {"latin": 1, "zh": 1}
    assert len(clean(texts, near_threshold=None, max_characters=60)[0]) == 3


@pytest.mark.skipif(not C4.is_file(), reason="the shared corpora are not on this machine")
def test_real_web_text() -> None:
    records = read_records(C4, want="text").records
    kept, report = clean([*records, *records[:20]])
    assert report["lost"]["copies"] >= 20 and report["kept"] > 0.9 * len(records)
    assert report["documents"] == report["kept"] + sum(report["lost"].values()) == len(records) + 20
    assert report["languages"]["latin"] == len(kept)
