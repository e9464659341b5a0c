"""The chat page in a real browser against a real server; what was clicked is looked up in the store."""

from __future__ import annotations

import json
import re
import time
from typing import TYPE_CHECKING, Any

import pytest
from tiny_site import MODELS_ARE_KNOWN, Site, make_home

if TYPE_CHECKING:
    from pathlib import Path

    from playwright.sync_api import Locator, Page

    from prairie.store.feedback import FeedbackEvent, Response

pytestmark = pytest.mark.browser


def write(page: Page, text: str, *, tokens: int = 40) -> None:
    """Sends a message whose answer has `tokens` tokens."""
    limit(page, tokens)
    page.fill("#input", text)
    page.press("#input", "Enter")


def limit(page: Page, tokens: int) -> None:
    page.evaluate(
        """(tokens) => { const field = document.getElementById("max-tokens");
        field.value = tokens; field.dispatchEvent(new Event("change")); }""",
        tokens,
    )


def wait(page: Page) -> None:
    """Until nothing is being written (a click or Enter has begun it before it returns)."""
    page.locator("#stop").wait_for(state="hidden")


def ask(page: Page, text: str, *, tokens: int = 40) -> Locator:
    """The finished answer."""
    write(page, text, tokens=tokens)
    wait(page)
    return page.locator(".assistant, .pair").last


def saved(place: Locator) -> None:
    place.locator('.vote-state[data-state="saved"]').wait_for()


def user_of(page: Page) -> str:
    return page.evaluate("JSON.parse(localStorage.getItem('prairie.user'))")


def answers(site: Site, page: Page) -> list[Response]:
    """What the store knows of this browser's answers, oldest first."""
    return [response for response in site.home.feedback.responses() if response.user == user_of(page)]


def events(site: Site, page: Page) -> list[FeedbackEvent]:
    return site.home.feedback.events(users=[user_of(page)])


def counting(site: Site, page: Page) -> list[FeedbackEvent]:
    return [event for event in site.home.feedback.current() if event.user == user_of(page)]


def until(check: Any, seconds: float = 90.0) -> Any:
    """The first true value of `check()`."""
    end = time.monotonic() + seconds
    while not (value := check()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)
    return value


# Answers


def test_an_answer_grows_and_says_where_it_comes_from(page: Page, site: Site):
    page.evaluate(
        """() => { window.lengths = []; new MutationObserver(() => {
        const text = document.querySelector(".assistant .markdown")?.textContent ?? "";
        if (text.length !== window.lengths.at(-1)) window.lengths.push(text.length);
        }).observe(document.getElementById("transcript"), { childList: true, subtree: true, characterData: true }); }"""
    )
    answer = ask(page, "Tell me about the fox.", tokens=200)
    lengths = page.evaluate("window.lengths")
    assert len(lengths) > 5 and lengths == sorted(lengths), "the text grew on the screen, and never shrank"
    (response,) = answers(site, page)
    assert response.status == "done" and response.surface == "web" and len(response.token_ids) == 200
    shown = answer.locator(".markdown").text_content()
    assert re.sub(r"\s+", "", shown) == re.sub(r"\s+", "", response.text)
    assert re.fullmatch(r"spark@1 · [\d.]+ tokens/s", answer.locator(".origin").text_content())
    assert answer.locator(".answer-state").text_content().startswith("Cut at the token limit")
    answer.locator(".origin").click()
    source = page.locator("#source").text_content()
    assert response.id in source and response.weights_hash in source and response.version_id in source


def test_stop_keeps_what_was_said_and_frees_the_server(page: Page, site: Site):
    write(page, "Go on and on.", tokens=3000)
    until(lambda: len(page.locator(".assistant .markdown").text_content()) > 20)
    page.click("#stop")
    wait(page)
    assert page.locator(".assistant .answer-state").text_content().startswith("Stopped")
    until(lambda: [response.status for response in answers(site, page)] == ["aborted"])
    assert len(answers(site, page)[0].token_ids) < 3000


def test_another_answer_stands_beside_the_first(page: Page, site: Site):
    answer = ask(page, "Hello.")
    first = answer.locator(".markdown").text_content()
    answer.get_by_label("Another answer").click()
    wait(page)
    answer = page.locator(".assistant")
    assert answer.locator(".count").text_content() == "2/2"
    second = answer.locator(".markdown").text_content()
    answer.get_by_label("Previous version").click()
    answer = page.locator(".assistant")
    assert answer.locator(".count").text_content() == "1/2"
    assert answer.locator(".markdown").text_content() == first != second
    one, two = answers(site, page)
    assert one.prompt == two.prompt
    page.reload()
    page.wait_for_selector(".assistant")
    assert page.locator(".count:visible").text_content() == "1/2", "a reload shows what stood there"


def test_an_edited_message_is_a_branch(page: Page, site: Site):
    ask(page, "First question.")
    page.locator(".user").hover()
    page.get_by_label("Edit and branch").click()
    page.locator(".user .editor textarea").fill("Second question.")
    page.get_by_role("button", name="Send as a branch").click()
    wait(page)
    assert page.locator(".said").text_content() == "Second question."
    assert page.locator(".user .count").text_content() == "2/2"
    assert [r.prompt[-1].content for r in answers(site, page)] == ["First question.", "Second question."]
    page.locator(".user").get_by_label("Previous version").click()
    assert page.locator(".said").text_content() == "First question."


def test_the_system_prompt_and_sampling_reach_the_model(page: Page, site: Site):
    page.click("#open-settings")
    page.fill("#system", "Speak like the wind.")
    page.locator("#temperature").fill("0.3")
    page.click("#close-settings")
    ask(page, "Who are you?", tokens=17)
    (response,) = answers(site, page)
    assert [m.role for m in response.prompt] == ["system", "user"]
    assert response.prompt[0].content == "Speak like the wind."
    assert response.sampling["temperature"] == 0.3 and response.sampling["max_tokens"] == 17


# Votes


def test_a_thumb_with_a_reason_is_saved_and_can_be_taken_back(page: Page, site: Site):
    answer = ask(page, "What is rain?")
    (response,) = answers(site, page)
    answer.get_by_label("Bad answer").click()
    answer.locator('[data-reason="too_long"]').click()
    answer.locator('[data-reason="not_followed"]').click()
    saved(answer)
    assert answer.locator(".vote-state").text_content().startswith("Saved")
    (event,) = events(site, page)  # three clicks within the time of one thought are one vote
    assert event.response_id == response.id and event.kind == "thumb"
    assert event.value == {"thumb": "down", "reasons": ["too_long", "not_followed"]}
    answer.locator('[data-reason="too_long"]').click()
    until(lambda: len(events(site, page)) == 2)
    assert [e.reasons for e in counting(site, page)] == [["not_followed"]]
    saved(answer)
    answer.get_by_role("button", name="Undo").click()
    until(lambda: answer.locator(".vote-state").text_content().startswith("Vote withdrawn"))
    until(lambda: counting(site, page) == [])
    assert {e.kind for e in events(site, page)} == {"thumb", "retract"}
    assert page.locator(".panel:visible").count() == 0


def test_a_thumb_up_and_a_comment(page: Page, site: Site):
    answer = ask(page, "What is snow?")
    answer.get_by_label("Good answer").click()
    saved(answer)
    assert answer.get_by_label("Good answer").get_attribute("aria-pressed") == "true"
    answer.locator(".origin").click()
    page.locator("#source").get_by_text(f"thumb ({events(site, page)[0].id})").wait_for()
    page.keyboard.press("Escape")
    answer.get_by_label("Comment", exact=True).click()
    page.keyboard.type("简短又好")
    page.keyboard.press("Enter")
    saved(answer)
    until(lambda: len(events(site, page)) == 2)
    assert [(e.kind, e.value) for e in events(site, page)] == [("thumb", "up"), ("comment", {"text": "简短又好"})]
    until(lambda: answer.locator(".comment-said").text_content() == "简短又好")


def test_a_correction_is_kept_and_the_conversation_goes_on_from_it(page: Page, site: Site):
    answer = ask(page, "What is the sun?")
    answer.get_by_label("Correct the answer").click()
    answer.locator(".editor textarea").fill("A star that is near.")
    answer.get_by_role("button", name="Save the correction").click()
    saved(answer)
    assert answer.locator(".markdown").text_content() == "A star that is near."
    (event,) = events(site, page)
    assert (event.kind, event.value) == ("edit", {"text": "A star that is near."})
    ask(page, "How near?")
    assert answers(site, page)[-1].prompt[1].content == "A star that is near."
    first = page.locator(".assistant").first
    first.get_by_role("button", name="Undo").click()
    until(lambda: first.locator(".markdown").text_content() != "A star that is near.")
    until(lambda: counting(site, page) == [])


def test_a_vote_outlives_a_server_that_dies(page: Page, site: Site):
    answer = ask(page, "Are you still there?")
    (response,) = answers(site, page)
    site.kill()
    answer.get_by_label("Good answer").click()
    answer.locator('.vote-state[data-state="waiting"]').wait_for()
    assert page.locator("#pending").text_content() == "1 vote is waiting for the server"
    assert events(site, page) == []
    kept = page.evaluate("Object.keys(localStorage).filter((key) => key.startsWith('prairie.outbox.')).length")
    assert kept == 1, "it is in the browser's storage, where a reload or a crash finds it"
    site.start()
    page.reload()
    saved(page.locator(".assistant"))
    assert [(e.response_id, e.value) for e in events(site, page)] == [(response.id, "up")]
    assert page.locator("#pending").is_hidden()


def test_an_acknowledgement_that_is_lost_does_not_vote_twice(page: Page, site: Site):
    answer = ask(page, "Twice?")
    seen = []

    def lose_the_first(route: Any) -> None:
        seen.append(route.request.headers["idempotency-key"])
        if len(seen) == 1:
            route.fetch()  # the server has it ...
            route.abort()  # ... and the page never hears of it
        else:
            route.continue_()

    page.route("**/v1/feedback", lose_the_first)
    answer.get_by_label("Good answer").click()
    saved(answer)
    assert len(seen) == 2 and seen[0] == seen[1]
    assert len(events(site, page)) == 1


def test_a_vote_whose_acknowledgement_another_tab_wrote_over_asks_again(page: Page, site: Site):
    answer = ask(page, "Two tabs.")
    answer.get_by_label("Good answer").click()
    saved(answer)
    page.evaluate(
        """() => { const name = Object.keys(localStorage).find((key) => key.startsWith("prairie.chat."));
        const chat = JSON.parse(localStorage.getItem(name));
        for (const { feedback } of Object.values(chat.nodes)) if (feedback) {
            feedback.thumb.state = "saving"; feedback.thumb.votes[0].event = null; }
        localStorage.setItem(name, JSON.stringify(chat)); }"""
    )
    page.reload()
    answer = page.locator(".assistant")
    saved(answer)
    assert len(events(site, page)) == 1
    answer.get_by_role("button", name="Undo").click()
    until(lambda: counting(site, page) == [] and len(events(site, page)) == 2)


def test_a_refused_vote_says_why(page: Page, site: Site):
    answer = ask(page, "Refuse me.")
    sentence = "no response chatcmpl-1; it was never given."
    body = {"error": {"message": sentence, "type": "invalid_request_error", "param": None, "code": "not_found"}}
    page.route("**/v1/feedback", lambda route: route.fulfill(status=404, json=body))
    answer.get_by_label("Good answer").click()
    answer.locator('.vote-state[data-state="refused"]').wait_for()
    assert sentence in answer.locator(".vote-state").text_content()
    assert page.locator("#pending").is_hidden()


# Comparison


def test_two_samples_blind(page: Page, site: Site):
    page.click("#compare")
    pair = ask(page, "Which one?")
    assert pair.locator(".candidate").count() == 2
    assert "spark" not in pair.text_content(), "no name before the vote"
    texts = [" ".join(pair.locator(".markdown").nth(i).text_content().split()) for i in (0, 1)]
    page.fill("#input", "Too early.")
    page.press("#input", "Enter")
    assert page.locator("#toast").text_content().startswith("Vote on the two answers first")
    page.fill("#input", "")
    pair.get_by_role("button", name="B is better").click()
    saved(pair)
    one, two = answers(site, page)
    assert one.prompt == two.prompt and {one.id + ":1", one.id} == {two.id, one.id}
    (event,) = events(site, page)
    (vote,) = [v for v in site.home.feedback.votes() if v.event.id == event.id]
    assert vote.decided and len(vote.over) == 1
    assert " ".join(vote.response.text.split()) == texts[1], "what was preferred is what stood at the right"
    assert " ".join(vote.over[0].text.split()) == texts[0]
    assert pair.locator(".origin").all_text_contents()[0].startswith("spark@1")
    ask(page, "And then?")
    assert answers(site, page)[-1].prompt[1].content == vote.response.text, "the conversation goes on with the winner"
    first = page.locator(".assistant").first
    assert first.locator(".count").text_content() in ("1/2", "2/2"), "the other answer stays beside it"


@pytest.mark.parametrize(("button", "key"), [("Tie", "tie"), ("Both bad", "both_bad")])
def test_two_models_that_do_not_differ(page: Page, site: Site, button: str, key: str):
    page.click("#compare")
    page.select_option("#rival", "tinder")
    pair = ask(page, "Sing.")
    assert not re.search("spark|tinder", pair.text_content())
    pair.get_by_role("button", name=button).click()
    saved(pair)
    (event,) = events(site, page)
    assert event.value[key] is True
    (vote,) = [v for v in site.home.feedback.votes() if v.event.id == event.id]
    assert not vote.decided and {vote.response.line, vote.over[0].line} == {"spark", "tinder"}
    names = pair.locator(".origin").all_text_contents()
    assert {name.split("@")[0] for name in names} == {"spark", "tinder"}
    left = pair.locator('[data-side="left"]')
    assert left.locator(".origin").text_content().startswith(vote.response.line), (
        "the names stand under their own answers"
    )


def test_the_sides_are_drawn_by_lot(open_page: Any):
    page = open_page()
    page.click("#compare")
    page.select_option("#rival", "tinder")
    seen = set()
    for _ in range(14):
        pair = ask(page, "Again.", tokens=4)
        pair.get_by_role("button", name="Skip").click()
        seen.add(pair.locator('[data-side="left"] .origin').text_content().split("@")[0])
        if len(seen) == 2:
            break
    assert seen == {"spark", "tinder"}, "fourteen times the same side has a chance of one in 8192"


# Typing, languages, themes, keys


def test_enter_that_accepts_a_word_does_not_send(page: Page, site: Site):
    limit(page, 20)
    page.focus("#input")
    keyboard = page.context.new_cdp_session(page)
    page.evaluate(
        """() => { window.heard = []; document.getElementById("input").addEventListener("keydown",
        (event) => window.heard.push(event.isComposing)); }"""
    )
    keyboard.send("Input.imeSetComposition", {"text": "ni hao", "selectionStart": 6, "selectionEnd": 6})
    keyboard.send(
        "Input.dispatchKeyEvent", {"type": "rawKeyDown", "key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 229}
    )
    assert page.evaluate("window.heard") == [True], "Chromium says that it composes"
    keyboard.send("Input.insertText", {"text": "你好"})
    # What Safari and older browsers send for the same key: composition is over, but the code is 229.
    page.evaluate(
        """() => document.getElementById("input").dispatchEvent(
        new KeyboardEvent("keydown", { key: "Enter", keyCode: 229, bubbles: true, cancelable: true }))"""
    )
    page.evaluate(
        """() => document.getElementById("input").dispatchEvent(
        new KeyboardEvent("keydown", { key: "Enter", isComposing: true, bubbles: true, cancelable: true }))"""
    )
    page.press("#input", "Shift+Enter")
    assert page.input_value("#input").strip() == "你好" and page.locator(".turn").count() == 0
    page.press("#input", "Enter")
    wait(page)
    assert answers(site, page)[0].prompt[-1].content.strip() == "你好"


def test_chinese_by_the_browser_and_by_the_switch(open_page: Any):
    page = open_page(locale="zh-CN")
    assert page.locator("#new-chat").text_content() == "新对话"
    assert page.get_attribute("html", "lang") == "zh-CN"
    answer = ask(page, "讲一个故事。")
    assert re.search(r"词元/秒", answer.locator(".origin").text_content())
    page.click("#language")
    assert page.locator("#new-chat").text_content() == "New chat"
    assert answer.get_by_label("Good answer").is_visible(), "what is on the page already changes too"
    page.reload()
    assert page.locator("#new-chat").text_content() == "New chat", "the choice is remembered"


def test_light_and_dark_by_the_system_and_by_the_switch(open_page: Any):
    page = open_page(color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.emulate_media(color_scheme="light")
    light = page.evaluate(ground)
    assert dark != light
    page.click("#theme")  # automatic -> light
    page.click("#theme")  # light -> dark
    assert page.evaluate(ground) == dark
    page.reload()
    assert page.evaluate(ground) == dark


def test_a_key_is_asked_for_once_and_kept(page: Page, site: Site):
    refusal = {
        "error": {"message": "no API key", "type": "authentication_error", "param": None, "code": "invalid_api_key"}
    }

    def guarded(route: Any) -> None:
        if route.request.headers.get("authorization") == "Bearer pk-test":
            route.continue_(headers={k: v for k, v in route.request.headers.items() if k != "authorization"})
        else:
            route.fulfill(status=401, json=refusal)

    page.route("**/v1/**", guarded)
    write(page, "Open up.")
    page.wait_for_selector("#key-dialog[open]")
    page.fill("#asked-key", "pk-test")
    page.keyboard.press("Enter")
    page.locator(".assistant .origin").wait_for()
    assert page.locator(".assistant").count() == 1, "the message that was refused is answered after all"
    until(lambda: [r.status for r in answers(site, page)] == ["done"])
    page.reload()
    page.locator(MODELS_ARE_KNOWN).first.wait_for(state="attached")
    assert page.locator("#key-dialog[open]").count() == 0
    ask(page, "And again.")


def test_a_server_with_keys_is_opened_by_the_browsers_own_box(open_page: Any, tmp_path: Path):
    with make_home(tmp_path) as home:
        key = home.keys.create("browser")
        site = Site(home).start()
        try:
            page = open_page(site, http_credentials={"username": "anyone", "password": key})
            answer = ask(page, "May I come in?")
            answer.get_by_label("Good answer").click()
            saved(answer)
            assert [event.value for event in events(site, page)] == ["up"]
        finally:
            site.stop()


def test_what_goes_wrong_is_said_in_the_servers_words(page: Page):
    sentence = "the prompt leaves no room for an answer in this model's context: got 9000 tokens, wanted at most 4095."
    body = {
        "error": {
            "message": sentence,
            "type": "invalid_request_error",
            "param": None,
            "code": "context_length_exceeded",
        }
    }
    page.route("**/v1/chat/completions", lambda route: route.abort())
    write(page, "Are you there?")
    page.get_by_text("The server cannot be reached.", exact=True).wait_for()
    page.unroute("**/v1/chat/completions")
    page.click("#new-chat")
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=400, json=body))
    write(page, "Too long.")
    page.wait_for_selector(".answer-state.failed")
    assert sentence in page.locator(".answer-state").text_content()
    page.unroute("**/v1/chat/completions")
    chunk = {"id": "chatcmpl-1", "choices": [{"index": 0, "delta": {"content": "Half an ans"}, "finish_reason": None}]}
    broken = f"data: {json.dumps(chunk)}\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=broken, content_type="text/event-stream"))
    page.get_by_role("button", name="Try again").click()
    page.get_by_text("The connection broke before the answer was finished.").wait_for()
    assert page.locator(".assistant .markdown").text_content() == "Half an ans"
    page.unroute("**/v1/chat/completions")
    page.get_by_role("button", name="Try again").click()
    page.wait_for_selector(".assistant .origin:not([hidden])")
    assert page.locator(".assistant .answer-state.failed:visible").count() == 0


# Conversations


def test_conversations_are_kept_found_renamed_exported_and_deleted(page: Page):
    ask(page, "About foxes.")
    page.click("#new-chat")
    ask(page, "About birds.")
    titles = page.locator("#chats .title")
    assert titles.all_text_contents() == ["About birds.", "About foxes."]
    page.fill("#search", "fox")
    assert titles.all_text_contents() == ["About foxes."]
    titles.first.click()
    assert page.locator(".said").text_content() == "About foxes."
    page.fill("#search", "")
    with page.expect_download() as download:
        page.click("#export")
    exported = json.loads(download.value.path().read_text(encoding="utf-8"))
    assert [m["role"] for m in exported["messages"]] == ["user", "assistant"]
    row = page.locator("#chats li.current")
    row.hover()
    row.get_by_label("Rename").click()
    page.keyboard.type("Foxes")
    page.keyboard.press("Enter")
    assert page.title() == "Foxes · Prairie"
    row = page.locator("#chats li.current")
    row.hover()
    row.get_by_label("Delete").click()
    assert titles.all_text_contents() == ["About birds."] and page.locator("#empty").is_visible()
    page.locator("#toast").get_by_role("button", name="Undo").click()
    assert set(titles.all_text_contents()) == {"About birds.", "Foxes"}


def test_a_conversation_that_is_being_written_can_be_deleted(page: Page, site: Site):
    write(page, "Delete me.", tokens=3000)
    until(lambda: len(page.locator(".assistant .markdown").text_content()) > 20)
    row = page.locator("#chats li.current")
    row.hover()
    row.get_by_label("Delete").click()
    until(lambda: [r.status for r in answers(site, page)] == ["aborted"])
    page.wait_for_timeout(1200)  # longer than a delayed save
    page.reload()
    assert page.locator("#chats .title").count() == 0
    assert page.evaluate("Object.keys(localStorage).filter((key) => key.startsWith('prairie.chat.'))") == []


def test_an_answer_goes_on_while_another_conversation_is_read(page: Page, site: Site):
    write(page, "Long story.", tokens=300)
    page.click("#new-chat")
    assert page.locator("#stop").is_hidden(), "the new conversation is free"
    until(lambda: [r.status for r in answers(site, page)] == ["done"])
    page.wait_for_timeout(200)
    page.locator("#chats .title").first.click()
    shown = "".join(page.locator(".assistant .markdown").text_content().split())
    assert shown == "".join(answers(site, page)[0].text.split())


def test_a_long_conversation_shows_its_end_first(page: Page):
    page.evaluate(
        """() => { const chat = { id: "c1", title: "Long", created: 1, updated: Date.now(), system: "", nodes: {},
        children: {}, active: {} };
        let parent = "root";
        for (let i = 0; i < 300; i++) {
            const id = "n" + i, user = i % 2 === 0;
            chat.nodes[id] = { id, parent, role: user ? "user" : "assistant", text: `message ${i}\n\n`.repeat(4),
                created: 1, ...(user ? {} : { status: "done", feedback: {}, response_id: "r" + i }) };
            chat.children[parent] = [id]; chat.active[parent] = id; parent = id; }
        localStorage.setItem("prairie.chat.c1", JSON.stringify(chat));
        localStorage.setItem("prairie.chats", JSON.stringify([{ id: "c1", title: "Long", updated: Date.now() }]));
        localStorage.setItem("prairie.open", '"c1"'); }"""
    )
    page.reload()
    page.locator(".turn").first.wait_for()
    assert page.locator(".turn").count() == 60
    from_the_end = "(({ scrollHeight, scrollTop, clientHeight }) => scrollHeight - scrollTop - clientHeight)"
    until(lambda: page.evaluate(f"{from_the_end}(document.getElementById('scroll'))") < 2)
    for count in (120, 180):
        page.get_by_role("button", name="Earlier messages").click()
        assert page.locator(".turn").count() == count
    ask(page, "And now?")
    assert page.locator(".said").last.text_content() == "And now?"


# Shape


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_a_phone_has_room_for_it(open_page: Any, locale: str):
    page = open_page(locale=locale, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    fits = "document.documentElement.scrollWidth <= 390 && document.getElementById('scroll').scrollWidth <= 390"
    assert page.evaluate(fits)
    answer = ask(page, "A fox? 狐狸？")
    answer.get_by_label(re.compile("Bad answer|回答得不好")).click()
    page.wait_for_selector(".panel:not([hidden])")
    page.click("#compare")
    ask(page, "Two foxes. " * 20)
    assert page.evaluate(fits)
    for button in ("#toggle-sidebar", "#close-sidebar", "#open-settings", "#close-settings"):
        page.click(button)


def test_everything_that_can_be_pressed_has_a_name(page: Page):
    ask(page, "Name yourself.")
    page.get_by_label("Bad answer").click()
    page.click("#compare")
    ask(page, "Name both.")
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, select, a")].filter((element) =>
        element.checkVisibility() && !element.getAttribute("aria-label") && !element.textContent.trim() &&
        !element.labels?.length).map((element) => element.outerHTML)"""
    )
    assert nameless == []
    twice = page.evaluate(
        "[...document.querySelectorAll('[id]')].map((e) => e.id).filter((id, i, all) => all.indexOf(id) !== i)"
    )
    assert twice == []


# The small modules, each in the browser that runs them


AWAY = 'target="_blank" rel="noopener noreferrer nofollow"'
CODE = '<div class="code"><pre tabindex="0"><code>'


def rendered(page: Page, source: str) -> str:
    return page.evaluate(
        """async (source) => { const { renderMarkdown } = await import("./static/markdown.js");
        const box = document.createElement("div"); renderMarkdown(box, source);
        box.querySelectorAll(".code-head").forEach((head) => head.remove()); return box.innerHTML; }""",
        source,
    )


@pytest.mark.parametrize(
    ("source", "html"),
    [
        ("one\ntwo\n\nthree", "<p>one<br>two</p><p>three</p>"),
        ("**b** *i* ~~s~~ `c < d`", "<p><strong>b</strong> <em>i</em> <s>s</s> <code>c &lt; d</code></p>"),
        ("他说**“好”**，走了", "<p>他说<strong>“好”</strong>，走了</p>"),
        ("snake_case_name 2*3*4 **open", "<p>snake_case_name 2<em>3</em>4 **open</p>"),
        ("# A\n## B ##", "<h3>A</h3><h4>B</h4>"),
        ("- a\n- b\n  1. c\n  2. d\n- e", "<ul><li>a</li><li>b<ol><li>c</li><li>d</li></ol></li><li>e</li></ul>"),
        ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
        ("> q\n> r", "<blockquote><p>q<br>r</p></blockquote>"),
        ("```js\nlet a = '<b>';\n", f"{CODE}let a = '&lt;b&gt;';\n</code></pre></div>"),
        ("|a|b|\n|-|-:|\n|1|2|", '<div class="table"><table><thead><tr><th>a</th><th class="right">b</th></tr></thead>'
         '<tbody><tr><td>1</td><td class="right">2</td></tr></tbody></table></div>'),
        ("<img src=x onerror=alert(1)>", "<p>&lt;img src=x onerror=alert(1)&gt;</p>"),
        ("[x](javascript:alert(1)) [y](data:text/html,z)", "<p><span>x</span> <span>y</span></p>"),
        ("![x](https://e.org/p.png)", f'<p><a href="https://e.org/p.png" {AWAY}>x</a></p>'),
        ("见https://e.org/a。好", f'<p>见<a href="https://e.org/a" {AWAY}>https://e.org/a</a>。好</p>'),
        ("\\*a\\* \\\\", "<p>*a* \\</p>"),
        ("a\n---\nb", "<p>a</p><hr><p>b</p>"),
    ],
)  # fmt: skip
def test_markdown(page: Page, source: str, html: str):
    assert rendered(page, source) == html


def test_markdown_that_grows_equals_markdown_that_is_whole(page: Page):
    source = "# T\n\npara **b**\n\n- a\n  - b\n\n```py\nx = 1\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n> q\n\nend `c`"
    grown, whole, kept = page.evaluate(
        """async (source) => { const { renderMarkdown } = await import("./static/markdown.js");
        const box = document.createElement("div"), other = document.createElement("div");
        renderMarkdown(box, source.slice(0, 12)); const head = box.firstElementChild;
        for (let i = 13; i <= source.length; i++) renderMarkdown(box, source.slice(0, i));
        renderMarkdown(other, source); return [box.innerHTML, other.innerHTML, head === box.firstElementChild]; }""",
        source,
    )
    assert grown == whole
    assert kept, "a finished block is not drawn again"


def test_markdown_does_not_choke_on_rubbish(page: Page):
    took_ms = page.evaluate(
        """async () => { const { renderMarkdown } = await import("./static/markdown.js");
        const start = performance.now();
        for (const piece of ["*", "**a", "[", "`", "_a", "> ", "- ", "|", "![a](", "\\n- ", "```\\n", "1. "])
            renderMarkdown(document.createElement("div"), piece.repeat(4000));
        return performance.now() - start; }"""
    )
    assert took_ms < 10_000


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_a_stream_cut_anywhere_loses_no_character(page: Page, size: int):
    words = ["你好", "🦊", "é\u0301", 'quote " and \\n', "end"]
    for newline in ("\n", "\r\n"):
        wire = f": comment{newline}{newline}" + "".join(
            f"data: {json.dumps(w, ensure_ascii=False)}{newline}{newline}" for w in words
        )
        got = page.evaluate(
            """async ([bytes, size]) => { const { events } = await import("./static/api.js");
            const all = new Uint8Array(bytes);
            const stream = new ReadableStream({ start(controller) {
                for (let i = 0; i < all.length; i += size) controller.enqueue(all.slice(i, i + size));
                controller.close(); } });
            const out = []; for await (const data of events(stream)) out.push(JSON.parse(data)); return out; }""",
            [list(wire.encode()), size],
        )
        assert got == words
