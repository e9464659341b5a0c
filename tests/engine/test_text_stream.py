"""Tokens to text: never half a character, never a stop string."""

import naive
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prairie.engine.request import TextStream

TEXT = st.text(alphabet="abc马🐎é \n", max_size=30)


def said(text, stops):
    tokenizer = naive.tokenizer()
    stream = TextStream(tokenizer, tuple(stops))
    pieces = []
    for token in tokenizer.encode(text):
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text
    return pieces, stream


@settings(deadline=None, max_examples=300)
@given(TEXT, st.lists(st.text(alphabet="abc马 \n", min_size=1, max_size=4), max_size=3))
def test_pieces_join_to_the_text_before_the_first_stop(text, stops):
    pieces, stream = said(text, stops)
    joined = "".join(pieces)
    assert "\ufffd" not in joined
    assert not any(stop in joined for stop in stops)
    assert text.startswith(joined)
    assert stream.stopped == any(stop in text for stop in stops)
    if not stream.stopped:
        assert joined == text
    else:
        assert any(text[len(joined) :].startswith(stop) for stop in stops)


def test_what_cannot_begin_a_stop_is_said_at_once():
    stream = TextStream(naive.tokenizer(), ("aba",))
    ids = [naive.tokenizer().encode(c)[0] for c in "cabcabac"]
    assert [stream.push(t) for t in ids] == ["c", "", "", "abc", "", "", "", ""]
    assert stream.stopped and stream.text == "cabc"


def test_held_text_is_said_at_the_end():
    _, stream = said("ab", ["abc"])
    assert stream.text == "ab" and not stream.stopped


@pytest.mark.parametrize("text", ["草原上的马🐎", "🐎" * 5, "é马"])
def test_characters_of_several_tokens_come_whole(text):
    pieces, _ = said(text, [])
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)


def test_a_half_character_at_the_end_is_shown_as_such():
    stream = TextStream(naive.tokenizer(), ())
    horse = naive.tokenizer().encode("🐘")
    assert len(horse) > 1
    assert stream.push(horse[0]) == "" and stream.finish() == "\ufffd"


def test_stop_strings_in_the_engine_span_tokens():
    free = naive.engine().generate([naive.request("r", naive.prompts()[8], max_tokens=20, ignore_eos=True)])[0]
    whole = naive.tokenizer().decode(free.token_ids)
    cut = whole[6:9]
    for stream in (True, False):
        subject = naive.engine()
        asked = naive.request("r", naive.prompts()[8], max_tokens=20, ignore_eos=True, stop=[cut, "never"])
        if not stream:
            (answer,) = subject.generate([asked])
        else:
            subject.add(asked)
            outputs = []
            while subject.has_work:
                outputs += subject.step()
            answer = outputs[-1].completion
            assert "".join(o.text_delta for o in outputs) == answer.text
        assert answer.text == whole[: whole.index(cut)] and answer.finish_reason == "stop"
        assert answer.token_ids == free.token_ids[: len(answer.token_ids)]
