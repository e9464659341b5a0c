"""The pages for Go and the studio in a real browser: a game is played to its end, a vote is followed into a turn."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import pytest
from tiny_site import Site, follow_to, go_home

from prairie.flywheel.chat import ChatActor, ChatGate, ChatLearner
from prairie.flywheel.curate import is_held_out
from prairie.flywheel.gate import Comparison, judge
from prairie.flywheel.loop import Flywheel
from prairie.flywheel.probes import Probe
from prairie.models.lora import LoRA, LoRAConfig
from prairie.models.weights import load_model, read_manifest
from prairie.pipeline.context import Context
from prairie.recipe import GateRules, VoteLearning, resolve_recipe
from prairie.runtime import Progress, Runtime
from prairie.store.home import Home

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from playwright.sync_api import Page

pytestmark = [pytest.mark.browser, pytest.mark.timeout(280)]


@pytest.fixture(scope="module")
def go_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A line on boards of 3 lines after two real turns."""
    home = go_home(tmp_path_factory.mktemp("go") / "home")
    site = Site(home).start()
    yield site
    site.stop()
    home.close()


def until_my_turn(page: Page) -> None:
    page.locator("#pass:not(:disabled), body:has(.goban[data-over=true]) #turn").first.wait_for()


def over(page: Page) -> bool:
    return page.locator(".goban").get_attribute("data-over") == "true"


def test_a_game_is_played_to_its_end_and_scored(open_page: Any, go_site: Site) -> None:
    page = open_page(go_site, to="go", ready=".goban .spot")
    assert page.locator("#curve .plot circle").count() == 2, "a dot for each turn"
    page.fill("#visits", "30")
    page.click("#new-game")
    page.locator('.spot[data-move="B2"]').click()
    until_my_turn(page)
    assert page.locator(".goban").get_attribute("data-moves") == "2"
    assert "Black wins" in page.locator("#value").inner_text() and page.locator("#candidates td").count() >= 4
    assert page.locator(".wish, .owned-black, .owned-white").count(), "policy or ownership stands on the board"
    for number in range(60):
        until_my_turn(page)
        if over(page):
            break
        free = page.locator(".goban .spot")
        if number < 6 and free.count():
            free.first.click()
        else:
            page.click("#pass")
    assert over(page)
    assert page.locator("#turn").inner_text().startswith(("Black wins by ", "White wins by "))
    assert "RE%5B" in page.locator("#sgf").get_attribute("href"), "the game as SGF, with its result"
    page.click("#undo")
    page.wait_for_function("() => document.querySelector('.goban[data-over=false]')")
    assert page.locator(".goban .spot").count() or not page.locator("#pass").is_disabled()


def test_the_champion_begins_when_it_is_black(open_page: Any, go_site: Site) -> None:
    page = open_page(go_site, to="go", ready=".goban .spot", locale="zh-CN")
    assert page.locator("#new-game").inner_text() == "新对局"
    page.select_option("#color", "white")
    page.click("#new-game")
    page.wait_for_function("() => document.querySelector('.goban').dataset.moves === '1'")
    until_my_turn(page)
    page.click("#hint")
    page.wait_for_function("() => document.querySelectorAll('#candidates td').length > 0")
    assert page.locator(".goban").get_attribute("data-moves") == "1", "to ask is not to move"


def test_a_vote_is_followed_into_the_turn_that_learned_from_it(open_page: Any, voted: Path) -> None:
    with Home(voted) as home:
        site = Site(home).start()
        try:
            follow(open_page, site, home)
        finally:
            site.stop()


def follow(open_page: Any, site: Site, home: Home) -> None:
    page = open_page(site)
    user = next(name for name in (f"web-{n:016d}" for n in range(40)) if not is_held_out(name))
    page.evaluate("(user) => localStorage.setItem('prairie.user', JSON.stringify(user))", user)
    page.reload()
    follow_to(page)
    answer = ask(page, "Is it fine?")
    assert answer.locator(".origin").inner_text().startswith("spark@1")
    answer.get_by_label("Correct the answer").click()
    answer.locator(".editor textarea").fill("Surely it is fine.")
    answer.get_by_role("button", name="Save the correction").click()
    answer.locator('.vote-state[data-state="saved"]').wait_for()

    page.goto(site.url + "/studio")
    mine = page.locator("#mine")
    mine.get_by_text("Waits for the next turn.").wait_for()

    told = turn_the_wheel(home)
    assert home.registry.champion("spark").number == 2, told

    mine.get_by_text("Your vote was used in turn 1: spark@2, promoted.").wait_for()
    turn = page.locator('.turned[data-turn="1"]')
    assert "spark@2 against spark@1" in turn.inner_text() and turn.locator(".interval .span").count() == 1
    page.locator("#lines").get_by_role("button", name="spark@2").click()
    page.locator("#lineage .node.model").nth(1).wait_for()
    assert page.locator("#lineage .arrow").count() >= 2

    page.goto(site.url + "/")
    follow_to(page)
    page.click("#new-chat")
    assert ask(page, "Is it fine?").locator(".origin").inner_text().startswith("spark@2"), "the new model answers"

    roll_back(page, site, home)


def test_what_waits_and_why_is_said_in_the_pages_language(open_page: Any, voted: Path) -> None:
    """A vertical on an old base, and a turn that was refused, on the Chinese page."""
    with Home(voted) as home:
        registry, first = home.registry, home.registry.champion("spark")
        probe = Probe("length ratio", 3.0, 0.3, 2.0)
        comparisons = [Comparison(f"user-{n}", f"q{m}", float(m % 2)) for n in range(8) for m in range(4)]
        verdict = judge(comparisons, probes=[probe], planned=100)
        registry.record_turn("spark", 1, first.artifact_id, first.artifact_id, None, verdict.to_json(), False)
        base = home.artifacts.get(first.artifact_id)
        lora, hashes = LoRA.create(load_model(base.path), LoRAConfig(rank=2), seed=1), read_manifest(base.path)
        with home.artifacts.create("adapter", "poet", {}, [base.id]) as folder:
            words = {name: hashes[name] for name in ("tokenizer_hash", "template_hash")}
            lora.save(folder, base_artifact=base.id, **words)
        with home.artifacts.create("model", "second", {"n": 2}) as folder:
            for path in base.path.iterdir():
                if path.name != "manifest.json":
                    (folder / path.name).write_bytes(path.read_bytes())
        made = {artifact.name: artifact.id for artifact in home.artifacts.list()}
        registry.promote(registry.register("spark:poet", made["poet"], kind="adapter", base=base.id))
        registry.promote(registry.register("spark", made["second"], kind="model"))
        site = Site(home).start()
        try:
            page = open_page(site, to="studio", ready=".turned .reasons li", locale="zh-CN")
            told = page.locator(".turned .reasons").inner_text()
            assert "计划需要 100 人" in told and "探针“长度之比”为 3.00，超出 0.30 到 2.00" in told
            page.locator("#lines [data-line='spark:poet'] .waits").get_by_text("prairie rejudge spark:poet").wait_for()
        finally:
            site.stop()


def turn_the_wheel(home: Home) -> str:
    """A whole turn on the votes in the store: DPO from the champion, judged by the people who do not teach."""
    recipe = resolve_recipe({"name": "t", "seed": 3, "stages": {"base": {"kind": "import", "path": "-"}}})
    context = Context(recipe, home, Runtime(threads=1, seed=3, progress=Progress(io.StringIO(), quiet=True)))
    learn = VoteLearning(
        steps=12, tokens_per_batch=512, max_tokens=128, lr=1e-2, weight_decay=0.0, sft_weight=0.2, adapter={"rank": 4}
    )
    gate = ChatGate(context, GateRules(items=20), ["numbers"], max_tokens=16)
    return (
        Flywheel("spark", home.registry, ChatActor(context, "spark"), ChatLearner(context, learn), gate)
        .turn()
        .verdict.text()
    )


def roll_back(page: Page, site: Site, home: Home) -> None:
    """On a loopback address without keys whoever reaches the page may press the button."""
    page.on("dialog", lambda dialog: dialog.accept())
    page.goto(site.url + "/studio")
    page.locator("#lines .rollback").click()
    page.locator("#said").get_by_text("spark@1 is champion now.").wait_for()
    assert home.registry.champion("spark").number == 1
    assert home.registry.history("spark")[-1].who == "no key"


def ask(page: Page, text: str) -> Any:
    page.evaluate(
        """() => { const field = document.getElementById("max-tokens");
        field.value = 12; field.dispatchEvent(new Event("change")); }"""
    )
    page.fill("#input", text)
    page.press("#input", "Enter")
    page.locator("#stop").wait_for(state="hidden")
    return page.locator(".assistant").last
