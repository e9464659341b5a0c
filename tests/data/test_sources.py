"""Every published shape, every kind of damage, and the real files where they lie beside the repository."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prairie.data.records import Chat, Message, Preference, Text, ToolCall
from prairie.data.sources import Loaded, read_records, write_records
from prairie.errors import DataError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def say(*turns: str) -> tuple[Message, ...]:
    """`say("u:hi", "a:yo")`."""
    roles: dict[str, Any] = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return tuple(Message(roles[turn[0]], turn[2:]) for turn in turns)


def written(folder: Path, *rows: object, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def read(folder: Path, *rows: object, **options: Any) -> Loaded[Any]:
    return read_records(written(folder, *rows), **options)


SG = {"from": "human", "value": "q"}
CHATS: list[tuple[str, dict[str, Any], tuple[Message, ...]]] = [
    ("messages", {"messages": [m.to_json() for m in say("s:be", "u:q", "a:r")]}, say("s:be", "u:q", "a:r")),
    (
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": "r"},
            ]
        },
        say("u:a\nb", "a:r"),
    ),
    (
        "messages",
        {
            "messages": [
                {"role": "developer", "content": "be"},
                {"role": "user", "content": "q"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"x": "é"}'}}],
                },
                {"role": "tool", "content": "1"},
                {
                    "role": "assistant",
                    "content": [{"type": "reasoning", "value": "why"}, {"type": "text", "value": "r"}],
                },
            ]
        },
        (
            *say("s:be", "u:q"),
            Message("assistant", "", (ToolCall("f", '{"x": "é"}'),)),
            *say("t:1"),
            Message("assistant", "r", reasoning="why"),
        ),
    ),
    (
        "sharegpt",
        {
            "system": "be",
            "conversations": [
                SG,
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "1"},
                {"from": "gpt", "value": "r"},
            ],
        },
        (*say("s:be", "u:q"), Message("assistant", "", (ToolCall("f", '{"x": 1}'),)), *say("t:1", "a:r")),
    ),
    ("alpaca", {"instruction": "do", "input": "", "output": "r"}, say("u:do", "a:r")),
    (
        "alpaca",
        {"instruction": "do", "input": "this", "output": "r", "history": [["q", "a"]], "system": "be"},
        say("s:be", "u:q", "a:a", "u:do\nthis", "a:r"),
    ),
    ("prompt_completion", {"prompt": "q", "completion": "r"}, say("u:q", "a:r")),
    ("prompt_completion", {"question": "q", "answer": "r"}, say("u:q", "a:r")),
    (
        "prompt_completion",
        {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "r"}]},
        say("u:q", "a:r"),
    ),
]


@pytest.mark.parametrize(("name", "row", "messages"), CHATS)
def test_conversations(tmp_path: Path, name: str, row: dict[str, Any], messages: tuple[Message, ...]) -> None:
    loaded = read(tmp_path, row, want="chat")
    assert loaded.format == name and not loaded.refused
    assert [record.messages for record in loaded.records] == [messages]
    assert loaded.records[0].source == "data.jsonl"


def row_of(chosen: object, rejected: object, **more: object) -> dict[str, object]:
    return {"chosen": chosen, "rejected": rejected, **more}


def msgs(*turns: str) -> list[dict[str, str]]:
    return [m.to_json() for m in say(*turns)]


PREFERENCES: list[tuple[str, dict[str, Any], tuple[tuple[Message, ...], ...]]] = [
    ("preference", row_of("good", "bad", prompt="q"), (say("u:q"), say("a:good"), say("a:bad"))),
    (
        "preference",
        row_of(msgs("a:good"), msgs("a:bad"), prompt=msgs("s:be", "u:q")),
        (say("s:be", "u:q"), say("a:good"), say("a:bad")),
    ),
    # As on the hub: a prompt and whole conversations on both sides; or whole conversations only.
    (
        "preference",
        row_of(msgs("u:q", "a:good"), msgs("u:q", "a:bad"), prompt="q"),
        (say("u:q"), say("a:good"), say("a:bad")),
    ),
    (
        "preference",
        row_of(msgs("u:q", "a:x", "u:p", "a:good"), msgs("u:q", "a:x", "u:p", "a:bad")),
        (say("u:q", "a:x", "u:p"), say("a:good"), say("a:bad")),
    ),
    (
        "preference",
        row_of({"from": "gpt", "value": "good"}, {"from": "gpt", "value": "bad"}, conversations=[SG]),
        (say("u:q"), say("a:good"), say("a:bad")),
    ),
    (
        "preference",
        row_of("good", "bad", instruction="do", input="this"),
        (say("u:do\nthis"), say("a:good"), say("a:bad")),
    ),
    (
        "hh",
        row_of("\n\nHuman: q\n\nAssistant: a\n\nHuman: p\n\nAssistant: good", "\n\nHuman: q\n\nAssistant: bad"),
        (say("u:q"), say("a:a", "u:p", "a:good"), say("a:bad")),
    ),
    (
        "hh",
        row_of("\n\nHuman: q\n\nAssistant: x\n\ny", "\n\nHuman: q\n\nAssistant: bad"),
        (say("u:q"), say("a:x\n\ny"), say("a:bad")),
    ),
]


@pytest.mark.parametrize(("name", "row", "sides"), PREFERENCES)
def test_preferences(tmp_path: Path, name: str, row: dict[str, Any], sides: tuple[tuple[Message, ...], ...]) -> None:
    loaded = read(tmp_path, row, want="preference")
    assert loaded.format == name and not loaded.refused
    assert [(r.prompt, r.chosen, r.rejected) for r in loaded.records] == [sides]
    assert read(tmp_path, row, want="chat").records[0].messages == (*sides[0], *sides[1])


def test_ranking_sets_the_best_against_each_other(tmp_path: Path) -> None:
    row = {"instruction": "do", "input": "", "output": ["best", "mid", "worst"], "history": []}
    loaded = read(tmp_path, row, {**row, "output": ["x", "x"]}, {**row, "output": "only"}, {**row, "output": ["one"]})
    assert loaded.format == "ranking"
    assert [(r.chosen[0].content, r.rejected[0].content, r.tags["rank"]) for r in loaded.records] == [
        ("best", "mid", 1),
        ("best", "worst", 2),
    ]
    assert [refusal.row for refusal in loaded.refused] == [2, 3, 4]
    assert [c.messages[-1].content for c in read(tmp_path, row, want="chat").records] == ["best"]


def test_thumbs_keep_their_label_and_dislikes_are_not_taught(tmp_path: Path) -> None:
    rows = [{"messages": msgs("u:q", "a:r"), "label": label} for label in (True, False)]
    assert [c.tags["label"] for c in read(tmp_path, *rows).records] == [True, False]
    taught = read(tmp_path, *rows, want="chat")
    assert len(taught.records) == 1 and "disliked" in taught.refused[0].reason and taught.refused[0].row == 2


BAD: list[tuple[object, str]] = [
    ("{not json", "the line is no JSON"),
    ("[" * 100_000, "the line is no JSON"),
    ("17", "no object"),
    ({"other": 1}, "the conversation is no list"),
    ({"messages": "hi"}, "the conversation is no list"),
    ({"messages": []}, "no assistant turn"),
    ({"messages": msgs("u:q", "u:p")}, "got roles user, user"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "unknown role: got 'wizard'"),
    ({"messages": ["hi"]}, "message 0 is no object"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown role"),
    ({"messages": [{"role": "user", "content": None}]}, "message 0 has no text"),
    ({"messages": [{"role": "user", "content": 5}]}, "message 0 has no text"),
    ({"messages": msgs("u:q", "a: ")}, "an answer is empty"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "no text: got 'image_url'",
    ),
    ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "a tool call has no name"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_bad_rows_are_refused_one_by_one(tmp_path: Path, row: object, reason: str) -> None:
    good = {"messages": msgs("u:q", "a:r")}
    loaded = read(tmp_path, good, "", row, good)
    assert len(loaded.records) == 2
    assert [(refusal.row, refusal.file) for refusal in loaded.refused] == [(3, "data.jsonl")]
    assert reason in loaded.refused[0].reason


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (row_of("same", "same", prompt="q"), "the same"),
        (row_of("", "bad", prompt="q"), "an answer is empty"),
        (row_of("good", None, prompt="q"), "no list"),
        (row_of("good", "bad", prompt=""), "does not end with a question"),
        (row_of("good", "bad", prompt=msgs("u:q", "a:r")), "does not end with a question: got assistant"),
        (row_of(msgs("u:q", "a:r"), msgs("u:other", "a:r")), "does not end with a question"),
    ],
)
def test_bad_preferences_are_refused(tmp_path: Path, row: object, reason: str) -> None:
    loaded = read(tmp_path, row_of("good", "bad", prompt="q"), row)
    assert len(loaded.records) == 1 and reason in loaded.refused[0].reason


def test_containers(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": "b"}]
    for name, data in {
        "a.json": json.dumps(rows, indent=1),
        "b.json": json.dumps({"version": 1, "data": rows}),
        "c.json": '{"text": "a"}\n{"text": "b"}\n',
        "d.jsonl": '\ufeff{"text": "a"}\r\n\r\n{"text": "b"}',
        "e.txt": "a\n<|endoftext|>\nb\n",
    }.items():
        for path in (tmp_path / name, tmp_path / f"{name}.gz"):
            path.write_bytes(gzip.compress(data.encode()) if path.suffix == ".gz" else data.encode())
            loaded = read_records(path, want="text")
            assert [r.text for r in loaded.records] == ["a", "b"] and loaded.format == "text", path.name
    assert len(read_records(tmp_path).records) == 20, "a folder is all its files"


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": msgs("u:q", "a:r"), "score": 1.5}, {"messages": msgs("u:q"), "score": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    loaded = read_records(tmp_path / "x.parquet", want="chat")
    assert loaded.records[0].messages == say("u:q", "a:r") and loaded.records[0].tags == {"score": 1.5}
    assert [refusal.row for refusal in loaded.refused] == [2]
    (tmp_path / "y.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match="no Parquet"):
        read_records(tmp_path / "y.parquet")


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 99)[:-20])
    (tmp_path / "notgz.jsonl.gz").write_bytes(b"plain")
    (tmp_path / "x.csv").write_text("a,b")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "folder").mkdir()
    for name, reason in {
        "missing.jsonl": "there is no file",
        "cut.jsonl.gz": "cannot be read",
        "notgz.jsonl.gz": "cannot be read",
        "x.csv": "unknown file type",
        "empty.jsonl": "is empty",
        "empty.txt": "is empty",
        "bad.json": "is no JSON",
        "folder": "holds no data",
    }.items():
        with pytest.raises(DataError, match=reason):
            read_records(tmp_path / name)
    with pytest.raises(DataError, match="the keys foo"):
        read(tmp_path, {"foo": 1})
    with pytest.raises(DataError, match=r"no usable row.*row 1.*no assistant turn"):
        read(tmp_path, {"messages": msgs("u:q")})
    with pytest.raises(DataError, match="holds no preference"):
        read(tmp_path, {"messages": msgs("u:q", "a:r")}, want="preference")
    with pytest.raises(DataError, match="no such data format"):
        read(tmp_path, {"text": "a"}, format="xml")


def test_format_can_be_told(tmp_path: Path) -> None:
    row = {"text": "a", "messages": msgs("u:q", "a:r")}
    assert read(tmp_path, row).format == "messages"
    assert read(tmp_path, row, format="text").records == [Text("a", "data.jsonl")]


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda text: bool(text.strip()))
turns = st.builds(lambda q, a: (Message("user", q), Message("assistant", a)), texts, texts)


@given(
    st.lists(
        st.one_of(
            st.lists(st.builds(Text, texts, st.just("s")), min_size=1),
            st.lists(st.builds(Chat, turns, st.just("s"), st.just({"k": [1]})), min_size=1),
            st.lists(
                st.builds(
                    lambda q, a, b: Preference(say("u:" + q), say("a:+" + a), say("a:-" + b), "s", {"k": 1}),
                    texts,
                    texts,
                    texts,
                ),
                min_size=1,
            ),
        ),
        min_size=1,
        max_size=1,
    )
)
@settings(max_examples=50, deadline=None)
def test_our_own_shapes_come_back(tmp_path_factory: pytest.TempPathFactory, lists: list[list[Any]]) -> None:
    for name in ("a.jsonl", "a.jsonl.gz"):
        path = tmp_path_factory.mktemp("own") / name
        write_records(path, lists[0])
        loaded = read_records(path)
        assert loaded.records == lists[0] and not loaded.refused


REAL = {
    "instruct/glaive_toolcall_en.jsonl": ("sharegpt", Chat, 270, 0),
    "instruct/glaive_toolcall_zh.jsonl": ("sharegpt", Chat, 283, 0),
    "instruct/identity_template.jsonl": ("alpaca", Chat, 91, 0),
    "instruct/oasst_sft_zh.jsonl": ("alpaca", Chat, 601, 0),
    "instruct/reason_tool_use_50.jsonl": ("messages", Chat, 50, 0),
    "instruct/self_instruct_seed_175.jsonl": ("alpaca", Chat, 175, 0),
    "instruct/sharegpt_dummy_identity.jsonl": ("sharegpt", Chat, 500, 0),
    "prefs/dpo_en_demo.jsonl": ("preference", Preference, 260, 0),
    "prefs/dpo_zh_demo.jsonl": ("preference", Preference, 242, 0),
    "prefs/hh_harmless_test.jsonl.gz": ("hh", Preference, 1722, 4),
    "prefs/oasst_rank_zh.jsonl": ("ranking", Preference, 1077, 3),
    "prefs/ultrafeedback_train_1k.jsonl.gz": ("preference", Preference, 994, 6),
    "corpora/c4_en_demo.jsonl.gz": ("text", Text, 270, 0),
    "corpora/chinese_classics.jsonl.gz": ("text", Text, 10295, 0),
    "corpora/chinese_poetry.jsonl.gz": ("text", Text, 27200, 0),
    "corpora/tinyshakespeare_train.txt": ("text", Text, 1, 0),
    "corpora/wikipedia_en_demo.jsonl.gz": ("text", Text, 28, 0),
    "feedback/thumbs_kto_en.jsonl.gz": ("messages", Chat, 1007, 0),
    "eval/gsm8k_train.jsonl.gz": ("prompt_completion", Chat, 7473, 0),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files(name: str) -> None:
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"{name} is not on this machine")
    form, kind, count, refused = REAL[name]
    loaded = read_records(path)
    assert (loaded.format, len(loaded.records), len(loaded.refused)) == (form, count, refused)
    assert Counter(type(record) for record in loaded.records) == {kind: count}
    for record in loaded.records:
        if isinstance(record, Preference):
            assert record.prompt[-1].role == "user" and record.chosen[0].role == record.rejected[0].role == "assistant"


def test_real_rows_are_read_as_they_stand() -> None:
    path = SHARED / "prefs" / "dpo_en_demo.jsonl"
    if not path.is_file():
        pytest.skip("the shared preferences are not on this machine")
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    for row, record in zip(rows, read_records(path, want="preference").records, strict=True):
        assert [m.content for m in record.prompt] == [turn["value"] for turn in row["conversations"]]
        assert record.chosen[0].content == row["chosen"]["value"]
        assert record.rejected[0].content == row["rejected"]["value"]
