"""ComfyUI's frontend in chromium, ready for use."""

from __future__ import annotations

import time
from contextlib import contextmanager

from comfy_paths import find_browser

CHROMIUM_FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
PATIENCE = 180_000  # milliseconds, for whatever a page is waited for: other processes may have both cores


@contextmanager
def open_browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=list(CHROMIUM_FLAGS), timeout=PATIENCE)
        yield browser
        browser.close()


@contextmanager
def open_page(browser, url: str, viewport={"width": 1600, "height": 1000}):  # noqa: B006 (not changed)
    """The frontend without its first-visit dialog; page.console holds what the console said (type, text)."""
    context = browser.new_context(viewport=viewport)
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    page.console = []
    page.on("console", lambda message: page.console.append((message.type, message.text)))
    page.on("pageerror", lambda error: page.console.append(("pageerror", str(error))))
    page.goto(url, wait_until="domcontentloaded")
    wait_until_ready(page)
    yield page
    context.close()


def wait_until_ready(page) -> None:
    # the spinner is there until the frontend has loaded the graph that it begins with, which would replace that of a test
    page.wait_for_function("window.app?.extensionManager && app.vueAppReady && app.extensionManager.spinner === false")
    page.wait_for_timeout(1500)
    page.keyboard.press("Escape")


def settled(page, expression: str, holds=bool, argument=None):
    """What a JavaScript expression gives, once it holds and is the same half a second later; where it never does, what it gives at last."""
    ends, before = time.monotonic() + PATIENCE / 1000, object()
    while True:
        found = page.evaluate(expression, argument)
        if (found == before and holds(found)) or time.monotonic() > ends:
            return found
        before = found
        page.wait_for_timeout(500)
