"""Answers and what is said of them: validation, one key one vote, the current view, forgetting."""

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from prairie.data.records import Message
from prairie.errors import ConflictError, NotFoundError, RequestError
from prairie.store.feedback import FeedbackEvent, Response, current_view
from prairie.store.home import Home
from prairie.store.schema import FEEDBACK_EVENTS, RESPONSES

PROMPT = (Message("system", "be kind"), Message("user", "两加三?"))


def answered(home, id, *, user="ann", text="five", prompt=PROMPT, **more):
    home.feedback.start_response(Response(id, "spark", prompt, line="spark", version_id="a1", user=user, **more))
    home.feedback.finish_response(id, [5, 6], [-0.25, -1.5], text, "stop", latency_ms=12.5)


@pytest.fixture
def feedback(home):
    for id in ("r1", "r2", "r3"):
        answered(home, id)
    answered(home, "other prompt", prompt=(Message("user", "why?"),))
    answered(home, "judged", purpose="gate")
    return home.feedback


def said(feedback, kind, value, user="ann", id="r1", key=None):
    return feedback.add(FeedbackEvent(id, kind, value, user=user), key)[0]


# Responses


def test_a_response_from_start_to_end(home):
    feedback = home.feedback
    started = Response(
        "chatcmpl-1", "spark", PROMPT, line="spark", version_id="a1", weights_hash="w", adapter_hash="ad",
        template_hash="t", sampling={"temperature": 0.7}, user="ann", surface="page",
    )  # fmt: skip
    feedback.start_response(started)
    assert feedback.get_response("chatcmpl-1") == started
    feedback.finish_response("chatcmpl-1", [5, 6], [-0.25, -1.5], "五 🙂", "stop", latency_ms=12.5)
    done = feedback.get_response("chatcmpl-1")
    assert (done.status, done.token_ids, done.logprobs, done.text) == ("done", (5, 6), (-0.25, -1.5), "五 🙂")
    assert (done.prompt, done.created, done.sampling) == (PROMPT, started.created, {"temperature": 0.7})
    with pytest.raises(ConflictError, match="done already"):
        feedback.finish_response("chatcmpl-1", [], None, "", "stop")
    with pytest.raises(ConflictError, match="started already"):
        feedback.start_response(started)
    with pytest.raises(NotFoundError, match="no response nobody"):
        feedback.finish_response("nobody", [], None, "", "stop")


def test_choices_start_together_or_not_at_all(home):
    home.feedback.start_response(Response("c:1", "spark", "raw text"))
    with pytest.raises(ConflictError):
        home.feedback.start_responses([Response("c", "spark", "raw text"), Response("c:1", "spark", "raw text")])
    with pytest.raises(NotFoundError):
        home.feedback.get_response("c")
    assert home.feedback.get_response("c:1").prompt == "raw text"


def test_what_was_cut_off_is_said_to_be(home):
    feedback = home.feedback
    feedback.start_response(Response("left", "spark", PROMPT))
    feedback.abort_response("left", [5], [-0.5], "fi")
    assert (feedback.get_response("left").status, feedback.get_response("left").text) == ("aborted", "fi")
    feedback.start_response(Response("old", "spark", PROMPT, created=time.time() - 100))
    feedback.start_response(Response("young", "spark", PROMPT))
    assert feedback.abort_started(older_than_s=50) == 1
    assert feedback.get_response("old").finish_reason == "crashed"
    assert feedback.get_response("young").status == "started"
    feedback.finish_response("old", [5], None, "alive after all", "stop")
    assert (feedback.get_response("old").status, feedback.get_response("old").finish_reason) == ("done", "stop")


# Adding


@pytest.mark.parametrize(
    "kind, value",
    [
        ("thumb", "up"),
        ("thumb", {"thumb": "down", "reasons": ["wrong", "太长"]}),
        ("rating", 1),
        ("rating", 5),
        ("choice", {"over": ["r2", "r3"]}),
        ("choice", {"over": ["r2"], "tie": True}),
        ("choice", {"over": ["r2"], "both_bad": True}),
        ("edit", {"text": "better"}),
        ("comment", {"text": "hm"}),
    ],
)
def test_what_can_be_said(feedback, kind, value):
    id = said(feedback, kind, value)
    (event,) = feedback.events()
    assert (event.id, event.kind, event.value, event.user) == (id, kind, value, "ann")


@pytest.mark.parametrize(
    "kind, value",
    [
        ("like", "up"), ("thumb", "sideways"), ("thumb", None), ("thumb", {"thumb": "up", "because": "x"}),
        ("thumb", {"thumb": "up", "reasons": "x"}), ("rating", 0), ("rating", 6), ("rating", True), ("rating", "5"),
        ("rating", 4.5), ("choice", "r2"), ("choice", {"over": []}), ("choice", {"over": ["r1"]}),
        ("choice", {"over": ["r2", "r2"]}), ("choice", {"over": ["r2"], "tie": True, "both_bad": True}),
        ("choice", {"over": ["r2"], "tie": "yes"}), ("choice", {"over": ["other prompt"]}), ("choice", {"over": [2]}),
        ("edit", {"text": "  "}), ("edit", "better"), ("comment", {"text": "x" * 100_001}), ("comment", {}),
        ("retract", {}), ("retract", "fb-1"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(feedback, kind, value):
    with pytest.raises(RequestError) as caught:
        said(feedback, kind, value)
    assert "wanted" in str(caught.value) or "prompt" in str(caught.value)
    assert feedback.events() == []


def test_what_points_nowhere_is_not_found(feedback):
    with pytest.raises(NotFoundError, match="no response r9"):
        said(feedback, "thumb", "up", id="r9")
    with pytest.raises(NotFoundError, match="no response r9"):
        said(feedback, "choice", {"over": ["r9"]})
    with pytest.raises(NotFoundError, match="no feedback fb-9 on response r1"):
        said(feedback, "retract", {"event": "fb-9"})
    with pytest.raises(RequestError, match="`user` cannot be used"):
        said(feedback, "thumb", "up", user="x" * 201)
    for key in ("", "x" * 201):
        with pytest.raises(RequestError, match="idempotency key"):
            said(feedback, "thumb", "up", key=key)


def test_one_key_is_one_vote(feedback):
    event = FeedbackEvent("r1", "thumb", "up", user="ann")
    id, created = feedback.add(event, "key")
    assert created
    again = FeedbackEvent("r1", "thumb", "up", user="ann", created=event.created + 60, surface="retry")
    assert feedback.add(again, "key") == (id, False)
    for other in (
        FeedbackEvent("r1", "thumb", "down", user="ann"),
        FeedbackEvent("r2", "thumb", "up", user="ann"),
        FeedbackEvent("r1", "thumb", "up", user="bob"),
        FeedbackEvent("r1", "comment", {"text": "up"}, user="ann"),
    ):
        with pytest.raises(ConflictError, match="was used for other feedback"):
            feedback.add(other, "key")
    assert len(feedback.events()) == 1
    assert feedback.add(event)[0] != feedback.add(event)[0], "without a key every vote is a new one"


def test_one_key_from_many_threads_and_two_stores_at_once(home, feedback):
    with Home(home.root) as other:
        results = []
        barrier = threading.Barrier(12)

        def go(store):
            barrier.wait()
            results.append(store.add(FeedbackEvent("r1", "thumb", "up", user="ann"), "key"))

        threads = [threading.Thread(target=go, args=([home, other][n % 2].feedback,)) for n in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len({id for id, _ in results}) == 1
    assert sorted(created for _, created in results) == [False] * 11 + [True]
    assert len(feedback.events()) == 1


# The current view


def test_the_latest_counts(feedback):
    said(feedback, "thumb", "up")
    bob = said(feedback, "thumb", "up", user="bob")
    down = said(feedback, "thumb", {"thumb": "down", "reasons": ["rude"]})
    stars = said(feedback, "rating", 4)
    said(feedback, "edit", {"text": "first"})
    edit = said(feedback, "edit", {"text": "second"})
    comments = [said(feedback, "comment", {"text": "same"}) for _ in range(2)]
    assert [e.id for e in feedback.current()] == [bob, down, stars, edit, *comments]
    assert len(feedback.events()) == 8


def test_a_retraction_takes_back_and_does_not_revive(feedback):
    first = said(feedback, "thumb", "up")
    second = said(feedback, "thumb", "down")
    said(feedback, "retract", {"event": first})  # no longer counted anyway
    assert [e.id for e in feedback.current()] == [second]
    said(feedback, "retract", {"event": second})
    assert feedback.current() == []
    third = said(feedback, "thumb", "up")
    assert [e.id for e in feedback.current()] == [third]


def test_only_the_giver_takes_back(feedback):
    id = said(feedback, "thumb", "up")
    with pytest.raises(RequestError, match="taken back by the user who gave it"):
        said(feedback, "retract", {"event": id}, user="bob")
    with pytest.raises(NotFoundError):
        said(feedback, "retract", {"event": id}, id="r2")
    retraction = said(feedback, "retract", {"event": id})
    with pytest.raises(RequestError, match="cannot be taken back"):
        said(feedback, "retract", {"event": retraction})


def test_a_choice_turned_round_counts_once(feedback):
    said(feedback, "choice", {"over": ["r2"]}, id="r1")
    turned = said(feedback, "choice", {"over": ["r1"]}, id="r2")
    among_three = said(feedback, "choice", {"over": ["r2", "r3"]}, id="r1")
    assert [e.id for e in feedback.current()] == [turned, among_three]


def by_the_book(events):
    """The rules of the module's docstring, word by word and slowly."""
    kept = []
    for index, event in enumerate(events):
        later = events[index + 1 :]
        among = lambda e: {e.response_id, *e.value.get("over", [])} if e.kind == "choice" else {e.response_id}  # noqa: E731
        replaced = any(
            e.kind == event.kind and e.user == event.user and among(e) == among(event) and e.kind != "comment"
            for e in later
        )
        retracted = any(e.kind == "retract" and e.value["event"] == event.id for e in events)
        if event.kind != "retract" and not replaced and not retracted:
            kept.append(event)
    return kept


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["thumb", "rating", "comment", "edit", "choice", "retract"]),
            st.sampled_from(["ann", "bob", None]),
            st.sampled_from(["r1", "r2"]),
            st.integers(0, 12),
        ),
        max_size=14,
    )
)
def test_the_view_is_what_the_rules_say(rows):
    events = []
    for index, (kind, user, response, pick) in enumerate(rows):
        if kind == "retract" and not events:
            continue
        value = {
            "thumb": "up",
            "rating": 3,
            "comment": {"text": "c"},
            "edit": {"text": "e"},
            "choice": {"over": ["r2" if response == "r1" else "r1"]},
            "retract": {"event": events[pick % len(events)].id if events else ""},
        }[kind]
        events.append(FeedbackEvent(response, kind, value, user=user, id=f"fb-{index}"))
    assert current_view(events) == by_the_book(events)


# Reading


def test_votes_carry_prompts_and_answers(feedback):
    up = said(feedback, "thumb", "up")
    choice = said(feedback, "choice", {"over": ["r2"]}, id="r3")
    tie = said(feedback, "choice", {"over": ["r1"], "tie": True}, id="r3")
    said(feedback, "thumb", "up", id="judged")
    votes = feedback.votes()
    assert [v.event.id for v in votes] == [up, choice, tie]
    assert votes[0].response.prompt == PROMPT and votes[0].response.text == "five"
    assert [r.id for r in votes[1].over] == ["r2"]
    assert [v.decided for v in votes] == [False, True, False]
    assert len(feedback.votes(purpose=None)) == 4
    assert len(feedback.votes(purpose="gate")) == 1
    assert feedback.votes(line="another") == []
    assert [v.event.id for v in feedback.votes(kinds=["thumb"])] == [up]
    assert feedback.votes(since=time.time() + 10) == []


def test_events_are_narrowed(feedback):
    said(feedback, "thumb", "up")
    said(feedback, "rating", 3, user="bob")
    said(feedback, "thumb", "down", id="judged", user="bob")
    assert [e.kind for e in feedback.events(["rating"])] == ["rating"]
    assert [e.kind for e in feedback.events(users=["bob"])] == ["rating", "thumb"]
    assert [e.response_id for e in feedback.events(purpose="gate")] == ["judged"]
    assert [e.kind for e in feedback.events(response_id="r1")] == ["thumb", "rating"]
    assert feedback.events(since=time.time() + 1) == []
    assert len(feedback.events(since=time.time() - 10, line="spark")) == 3


def test_figures(feedback):
    said(feedback, "thumb", "up")
    said(feedback, "thumb", "down")
    said(feedback, "thumb", "up", user="bob", id="r2")
    said(feedback, "edit", {"text": "x"}, user="bob", id="r2")
    figures = feedback.stats()
    assert figures["events"] == 4 and figures["users"] == 2
    assert figures["by_kind"] == {"thumb": 3, "edit": 1}
    assert figures["thumbs"] == {"down": 1, "up": 1}
    assert figures["responses"] == {"done": 5}
    assert figures["by_model"] == [{"line": "spark", "version_id": "a1", "up": 1, "down": 1, "ratings": 0, "edits": 1}]


def test_everything_can_be_taken_away(feedback):
    said(feedback, "thumb", "up")
    said(feedback, "comment", {"text": "好"})
    rows = list(feedback.export())
    assert [row["event"]["kind"] for row in rows] == ["thumb", "comment"]
    assert rows[0]["response"]["prompt"][1] == {"role": "user", "content": "两加三?"}
    assert rows[0]["response"]["logprobs"] == (-0.25, -1.5)


# Forgetting


def test_forget_deletes_on_the_disk_and_names_what_learned(home):
    feedback = home.feedback
    answered(home, "r1", user="ann", text="SECRET-ANSWER", prompt=(Message("user", "SECRET-PROMPT"),))
    answered(home, "r2", user="bob")
    own = said(feedback, "comment", {"text": "SECRET-COMMENT"}, key="k")
    said(feedback, "thumb", "down", user="bob")
    kept = said(feedback, "thumb", "up", user="bob", id="r2")
    store = home.artifacts

    def make(kind, name, inputs, events=()):
        with store.create(kind, name, {"name": name}, inputs, "", events=events) as folder:
            (folder / ("prairie.json" if kind == "candidate" else "x")).write_text("{}")
        return store.id_of(kind, {"name": name}, inputs, "")

    dataset = make("dataset", "votes", [], [own, kept])
    clean = make("dataset", "clean", [], [kept])
    model = make("candidate", "learned", [dataset])
    later = make("candidate", "went on from it", [model, clean])
    make("candidate", "innocent", [clean])
    home.registry.register("spark", model, kind="model")
    home.registry.promote("spark@1")

    def readable(secret):
        if home.url:  # Postgres: what any query can still find
            with home.database.read() as connection:
                rows = [connection.execute(select(table)).all() for table in (RESPONSES, FEEDBACK_EVENTS)]
            return secret.decode() in str(rows)
        files = [home.root / f"prairie.db{end}" for end in ("", "-wal")]
        return any(secret in file.read_bytes() for file in files if file.exists())

    assert readable(b"SECRET-ANSWER") and readable(b"SECRET-PROMPT") and readable(b"SECRET-COMMENT")
    report = feedback.forget("ann")
    assert not readable(b"SECRET-ANSWER") and not readable(b"SECRET-PROMPT") and not readable(b"SECRET-COMMENT")
    assert (report["events"], report["responses"], report["erased_from_log"]) == (1, 1, home.url is None)
    assert report["datasets"] == [{"id": dataset, "name": "votes", "events": 1}]
    assert report["models"] == [
        {"id": model, "name": "learned", "versions": ["spark@1"]},
        {"id": later, "name": "went on from it", "versions": []},
    ]
    assert report["champions"] == ["spark@1"]
    assert feedback.forgotten() == [own]
    tomb = feedback.get_response("r1")
    assert (tomb.status, tomb.user, tomb.prompt, tomb.text, tomb.token_ids) == ("forgotten", None, "", None, None)
    assert tomb.version_id == "a1"
    assert feedback.events(users=["ann"]) == []
    assert [v.event.id for v in feedback.votes()] == [kept], "a vote on a forgotten answer teaches nothing"
    with pytest.raises(NotFoundError, match="was forgotten"):
        said(feedback, "comment", {"text": "SECRET-COMMENT"}, key="k")
    again = feedback.forget("ann")
    assert (again["events"], again["responses"], again["datasets"]) == (0, 0, [])


def test_an_answer_under_way_stays_forgotten(home):
    home.feedback.start_response(Response("r1", "spark", PROMPT, user="ann"))
    home.feedback.forget("ann")
    home.feedback.finish_response("r1", [5], None, "five", "stop")
    assert home.feedback.get_response("r1").text is None


# Done, not said


def test_what_was_done_is_kept_and_checked(feedback):
    said(feedback, "regenerate", {"new": "r2"})
    said(feedback, "copy", None)
    said(feedback, "copy", {})
    said(feedback, "abandon", None, id="r2")
    assert [(e.kind, e.value) for e in feedback.current(purpose="chat")] == [
        ("regenerate", {"new": "r2"}), ("copy", {}), ("abandon", {}),
    ]  # fmt: skip
    votes = feedback.votes(kinds=["regenerate"])
    assert [(v.response.id, [r.id for r in v.over]) for v in votes] == [("r1", ["r2"])]
    for kind, value, about in (
        ("regenerate", {"new": "r1"}, "cannot be used"), ("regenerate", {"new": "other prompt"}, "the same prompt"),
        ("copy", {"text": "x"}, "wanted nothing"), ("abandon", 3, "wanted nothing"),
        ("regenerate", {"new": 3}, "id of"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=about):
            said(feedback, kind, value)
    with pytest.raises(NotFoundError):
        said(feedback, "regenerate", {"new": "nobody"})


# What a page asks for every few seconds


def test_the_newest_are_asked_for_without_reading_all(feedback):
    for value in ("up", "down", "up"):
        said(feedback, "thumb", value)
    every = feedback.events()
    assert feedback.events(newest=2) == every[-2:] and feedback.events(newest=9, users=["ann"]) == every
    answers = feedback.responses()
    assert feedback.responses(newest=2) == answers[-2:]
    assert feedback.responses_by_id([answers[0].id, "nobody"]) == {answers[0].id: answers[0]}
    since = answers[1].created
    assert [(g.created, g.status, g.latency_ms) for g in feedback.glimpses(since)] == [
        (a.created, a.status, a.latency_ms) for a in answers if a.created >= since
    ]
    assert sorted(feedback.said_at(every[1].created)) == [event.created for event in every[1:]]


def test_the_mark_changes_with_whatever_changes_the_counts(feedback):
    marks = [feedback.mark()]
    said(feedback, "thumb", "up", key="k")
    marks.append(feedback.mark())
    said(feedback, "thumb", "up", key="k")
    assert feedback.mark() == marks[-1], "the same vote again is no other vote"
    feedback.forget("ann")
    assert len({*marks, feedback.mark()}) == 3
