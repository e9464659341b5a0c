"""Pictures of the chat page for the documentation, taken from a server that runs.

    python -m tests.web.screenshots --url http://127.0.0.1:8000 --out docs/images

Asks real questions and gives real votes: use a home made for it. Written: chat-light, chat-dark-zh, vote, edit, source,
compare-blind, compare-told, phone-en, phone-zh; with `--go` go and go-dark, with `--studio` studio and
studio-dark (.png).
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from playwright.sync_api import sync_playwright

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
DESK = {"viewport": {"width": 1280, "height": 820}}
PHONE: dict[str, Any] = {
    "viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "has_touch": True, "is_mobile": True,
}  # fmt: skip
ENGLISH = {"locale": "en-US", "color_scheme": "light"}
DARK = {"locale": "en-US", "color_scheme": "dark"}
CHINESE = {"locale": "zh-CN", "color_scheme": "dark"}

QUESTIONS = ["Write 4072 in Chinese.", "Convert 35 km to m.", "What does math.sqrt do?"]
QUESTION_ZH = "把4072写成中文数字。"


class Camera:
    """Opens the page in fresh profiles and keeps what it shows."""

    def __init__(self, browser: Browser, url: str, out: Path, model: str | None) -> None:
        self.browser, self.url, self.out, self.model = browser, url, out, model

    @contextmanager
    def page(self, to: str = "", ready: str = "#model option:not([value=''])", **look: Any) -> Iterator[Page]:
        context = self.browser.new_context(**look)
        page = context.new_page()
        page.set_default_timeout(180_000)
        page.goto(self.url.rstrip("/") + "/" + to)
        page.locator(ready).first.wait_for(state="attached")
        if self.model and not to:
            page.select_option("#model", self.model)
        yield page
        context.close()

    def shoot(self, page: Page, name: str) -> None:
        page.mouse.move(2, 400)  # nothing is hovered over
        page.wait_for_timeout(900)  # votes are on disk, what moves has come to rest
        page.screenshot(path=self.out / f"{name}.png")
        print(self.out / f"{name}.png")


def ask(page: Page, text: str) -> Locator:
    page.fill("#input", text)
    page.press("#input", "Enter")
    page.locator("#stop").wait_for(state="hidden")
    answer = page.locator(".assistant, .pair").last
    if answer.locator(".failed:visible").count():
        sys.exit(f"no answer to {text!r}: {answer.locator('.failed').first.inner_text()}")
    return answer


def english(camera: Camera, questions: list[str]) -> None:
    with camera.page(**DESK, **ENGLISH) as page:
        answer = ask(page, questions[0])
        answer.get_by_label("Good answer").click()
        camera.shoot(page, "chat-light")
        answer = ask(page, questions[1])
        answer.get_by_label("Bad answer").click()
        answer.locator('[data-reason="wrong"]').click()
        camera.shoot(page, "vote")
        answer.locator(".origin").click()
        camera.shoot(page, "source")
        page.keyboard.press("Escape")
        answer.get_by_label("Correct the answer").click()
        camera.shoot(page, "edit")


def compare(camera: Camera, question: str) -> None:
    with camera.page(**DESK, **ENGLISH) as page:
        page.click("#compare")
        rivals = page.locator("#rival option").evaluate_all("all => all.map((option) => option.value)")
        page.select_option("#rival", rivals[-1])
        pair = ask(page, question)
        camera.shoot(page, "compare-blind")
        pair.locator('[data-verdict="left"]').click()
        camera.shoot(page, "compare-told")


def chinese(camera: Camera, question: str) -> None:
    with camera.page(**DESK, **CHINESE) as page:
        answer = ask(page, question)
        answer.get_by_label("回答得好").click()
        camera.shoot(page, "chat-dark-zh")


def phone(camera: Camera, english: str, chinese: str) -> None:
    with camera.page(**PHONE, **ENGLISH) as page:
        ask(page, english).get_by_label("Good answer").click()
        camera.shoot(page, "phone-en")
    with camera.page(**PHONE, **CHINESE) as page:
        page.click("#compare")
        ask(page, chinese)
        camera.shoot(page, "phone-zh")


READY = "#pass:not(:disabled), body:has(.goban[data-over=true]) #turn"
"""What stands on the Go page when nobody is thinking."""


def advised(page: Page) -> str:
    """Asks the champion for our move."""
    page.click("#hint")
    page.locator("#candidates td").first.wait_for()
    page.locator(READY).first.wait_for()
    return page.locator("#candidates td").first.inner_text()


def go(camera: Camera) -> None:
    """A game under way, with what the champion thinks of it; and one that is over."""
    for name, look, moves in (("go", ENGLISH, 2), ("go-dark", DARK, 60)):
        with camera.page("go", ".goban .spot", **DESK, **look) as page:
            page.fill("#visits", "200")
            page.click("#new-game")
            for _ in range(moves):
                page.locator(READY).first.wait_for()
                if page.locator(".goban").get_attribute("data-over") == "true":
                    break
                move = advised(page)
                page.click("#pass" if move == "pass" else f'.spot[data-move="{move}"]')
            page.locator(READY).first.wait_for()
            if page.locator(".goban").get_attribute("data-over") != "true":
                advised(page)
            camera.shoot(page, name)


def studio(camera: Camera, user: str | None) -> None:
    """As `user` sees it, who has voted."""
    tall = {"viewport": {"width": 1280, "height": 1180}}
    for name, look in (("studio", ENGLISH), ("studio-dark", DARK)):
        with camera.page("studio", "#lines .card", **tall, **look) as page:
            if user:
                page.evaluate("(user) => localStorage.setItem('prairie.user', JSON.stringify(user))", user)
                page.reload()
            page.locator("#lineage .node").first.wait_for()
            camera.shoot(page, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--model", help="name in the picker; default: the first one")
    parser.add_argument("--ask", nargs=3, metavar="QUESTION", default=QUESTIONS, help="three questions in English")
    parser.add_argument("--ask-zh", default=QUESTION_ZH, help="a question in Chinese")
    parser.add_argument("--go", action="store_true", help="only the Go page; the server has a line that plays")
    parser.add_argument("--studio", action="store_true", help="only the studio")
    parser.add_argument("--user", help="whose votes the studio follows; default: a new browser's, who has none")
    given = parser.parse_args()
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        sys.exit("no chromium on this machine; install one to take pictures")
    given.out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, headless=True, args=list(ARGUMENTS))
        camera = Camera(browser, given.url, given.out, given.model)
        if given.go:
            go(camera)
        if given.studio:
            studio(camera, given.user)
        if not given.go and not given.studio:
            english(camera, given.ask)
            compare(camera, given.ask[2])
            chinese(camera, given.ask_zh)
            phone(camera, given.ask[0], given.ask_zh)
        browser.close()


if __name__ == "__main__":
    main()
