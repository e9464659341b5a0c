"""All that was said of a line as one artifact that names every event it holds."""

import pytest

from prairie.data.sources import read_records
from prairie.errors import DataError
from prairie.flywheel.curate import is_held_out
from prairie.flywheel.datasets import feedback_dataset
from prairie.store.feedback import FeedbackEvent
from prairie.store.home import Home


@pytest.fixture
def home(voted):
    with Home(voted) as home:
        yield home


def test_everything_said_is_in_its_file_and_named(home):
    first = next(e for e in home.feedback.events() if not is_held_out(e.user))
    for kind, value in (
        ("edit", {"text": "Surely. Call 13800138000."}), ("thumb", "down"), ("comment", {"text": "dry"}),
        ("regenerate", {"new": first.value["over"][0]}), ("copy", None),
    ):  # fmt: skip
        home.feedback.add(FeedbackEvent(first.response_id, kind, value, user=first.user))
    made = feedback_dataset(home, "spark")
    assert made.figures["train"] | {"dropped": {}} == {
        "pairs": 33, "weak": 1, "labelled": 1, "edits": 1, "comments": 1, "dropped": {}, "masked": {"phone": 1},
        "distrusted": [],
    }  # fmt: skip
    assert made.figures["held_out"]["pairs"] == 28
    pairs = read_records(made.path / "pairs" / "train.jsonl").records
    assert len(pairs) == 33 and not any(is_held_out(pair.tags["user"]) for pair in pairs)
    assert read_records(made.path / "edits" / "train.jsonl").records[0].messages[-1].content == "Surely. Call [phone]."
    assert read_records(made.path / "labelled" / "train.jsonl").records[0].tags["label"] is False
    assert '"comment": "dry"' in (made.path / "comments.jsonl").read_text()
    wanted = {e.id for e in home.feedback.events() if e.kind != "copy"}  # the thumb says more than the copy
    assert set(made.events) == wanted
    assert feedback_dataset(home, "spark").id == made.id

    forgotten = home.feedback.forget(first.user)
    assert [(d["id"], d["events"]) for d in forgotten["datasets"]] == [(made.id, 8)]
    assert feedback_dataset(home, "spark").id != made.id


def test_held_out_by_time(home):
    made = feedback_dataset(home, "spark", split="time", share=0.5)
    assert made.figures["held_out"]["pairs"] == pytest.approx(30, abs=4)


def test_what_cannot_be_made(home):
    with pytest.raises(DataError, match="nothing that was said of `other` gives a record: got 0 votes"):
        feedback_dataset(home, "other")
    with pytest.raises(DataError, match="a share cannot be held out"):
        feedback_dataset(home, "spark", share=1.0)
