"""Logs of other systems: every row becomes an answer with its feedback, or is refused by number; twice is once."""

import gzip
import json
from pathlib import Path

import pytest

from prairie.errors import DataError
from prairie.flywheel.curate import curate
from prairie.store.logs import read_log

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "feedback"


def written(folder, *rows, name="log.jsonl"):
    file = folder / name
    text = "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
    file.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return file


def request(question="q", text="a", **more):
    return {
        "request": {"model": "gpt", "messages": [{"role": "user", "content": question}], "temperature": 0.5},
        "response": {
            "id": "c1", "model": "gpt-x", "created": 1_700_000_000,
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        },
        **more,
    }  # fmt: skip


def taken(home, file, line="spark"):
    return home.feedback.take_over(read_log(file, line).talks)


def test_requests_of_openai_with_feedback(home, tmp_path):
    said = [{"kind": "thumb", "value": {"thumb": "down", "reasons": ["dry"]}}, {"kind": "edit", "value": {"text": "b"}}]
    file = written(tmp_path, request(user="ann", feedback=said, latency_ms=40), request("q2"), name="log.jsonl.gz")
    assert taken(home, file) == {"responses": 2, "known_responses": 0, "events": 2, "known_events": 0}
    assert taken(home, file) == {"responses": 0, "known_responses": 2, "events": 0, "known_events": 2}
    votes = home.feedback.votes(line="spark")
    assert [(v.event.kind, v.event.user, v.response.text, v.response.model) for v in votes] == [
        ("thumb", "ann", "a", "gpt-x"), ("edit", "ann", "a", "gpt-x"),
    ]  # fmt: skip
    first = votes[0].response
    assert (first.sampling, first.created, first.latency_ms, first.status) == ({"temperature": 0.5}, 1.7e9, 40, "done")
    assert [pair.chosen[0].content for pair in curate(votes).pairs] == ["b"]


def test_content_in_parts_and_roles(tmp_path):
    row = request([{"type": "text", "text": "两加"}, {"type": "text", "text": "三?"}])
    row["request"]["messages"].insert(0, {"role": "developer", "content": "be kind"})
    response = read_log(written(tmp_path, row)).talks[0][0]
    assert [(m.role, m.content) for m in response.prompt] == [("system", "be kind"), ("user", "两加三?")]


def test_what_cannot_be_used_is_refused_by_number(tmp_path):
    picture = request([{"type": "image_url", "image_url": {"url": "x"}}])
    file = written(
        tmp_path, request(), "{broken", picture, {"a": 1}, "[1]", {"messages": [], "label": True}, request("2")
    )
    log = read_log(file)
    assert len(log.talks) == 2 and [row for row, _ in log.refused] == [2, 3, 4, 5, 6]
    reasons = " | ".join(why for _, why in log.refused)
    assert "no text: got image_url" in reasons and "unknown shape: got keys a" in reasons
    with pytest.raises(DataError, match="no usable row: got row 1"):
        read_log(written(tmp_path, {"a": 1}))
    with pytest.raises(DataError, match="there is no file"):
        read_log(tmp_path / "none.jsonl")
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 1000)[:-20])
    with pytest.raises(DataError, match="cannot be read"):
        read_log(tmp_path / "torn.jsonl.gz")


def test_our_own_export_comes_back(home, tmp_path):
    taken(home, written(tmp_path, request(user="ann", feedback=[{"kind": "thumb", "value": "up"}])))
    rows = list(home.feedback.export())
    log = read_log(written(tmp_path, *rows, name="export.jsonl"))
    assert log.formats == {"export": 1} and log.talks[0][0] == home.feedback.get_response(log.talks[0][0].id)
    assert home.feedback.take_over(log.talks)["known_responses"] == 1


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data/feedback is not here")
def test_a_real_log_of_thumbs(home):
    log = read_log(SHARED / "thumbs_kto_en.jsonl.gz", "spark")
    assert (len(log.talks), log.refused, log.formats) == (1007, [], {"labelled": 1007})
    counts = home.feedback.take_over(log.talks)
    assert counts["events"] + counts["known_events"] == 1007 and counts["events"] >= 1000
    stats = home.feedback.stats(line="spark")
    assert stats["thumbs"]["up"] + stats["thumbs"]["down"] == stats["current"]["thumb"]
    labelled = curate(home.feedback.votes(line="spark")).labelled
    assert len(labelled) == 100, "nobody is named, so all of them are one person and get one person's share"


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data/feedback is not here")
def test_a_real_log_of_a_gateway(home):
    log = read_log(SHARED / "gateway_log_tensorzero.jsonl.gz", "spark")
    assert len(log.talks) == 1270 and log.refused == []
    assert log.skipped["a score that a machine gave"] == 500
    assert log.skipped["a float on a scale that is not known"] == 407
    assert log.skipped["a comment on a whole episode"] == 130
    counts = home.feedback.take_over(log.talks)
    assert counts["events"] == 410
    pairs = curate(home.feedback.votes(line="spark")).pairs
    assert pairs and {pair.tags["why"] for pair in pairs} == {"edit"}
