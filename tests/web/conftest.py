"""A headless Chromium and a real server for it, once per run. Tests skip with the reason where there is no Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from tiny_site import MODELS_ARE_KNOWN, Site, make_home

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

# Nothing that a browser does by itself may reach for the network.
ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
DESK = {"width": 1280, "height": 860}


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, headless=True, args=list(ARGUMENTS))
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    home = make_home(tmp_path_factory.mktemp("home"))
    site = Site(home).start()
    yield site
    site.stop()
    home.close()


@pytest.fixture
def open_page(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Any]:
    """`open_page(locale="zh-CN", to="go", ...)`: a page in a fresh profile. Its errors, and requests elsewhere, fail a
    test."""
    contexts, wrong = [], []

    def open(at: Site | None = None, to: str = "", ready: str = MODELS_ARE_KNOWN, **options: Any) -> Page:
        at = at or request.getfixturevalue("site")
        context = browser.new_context(**{"locale": "en-US", "viewport": DESK, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(90_000)
        page.on("pageerror", lambda error: wrong.append(f"error on the page: {error}"))
        page.on("request", lambda request: request.url.startswith((at.url, "blob:")) or wrong.append(request.url))
        page.goto(f"{at.url}/{to}")
        page.locator(ready).first.wait_for(state="attached")
        return page

    yield open
    for context in contexts:
        context.close()
    assert not wrong


@pytest.fixture
def page(open_page: Any) -> Page:
    return open_page()
