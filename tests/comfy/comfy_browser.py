"""ComfyUI's frontend in chromium, ready for use."""

from __future__ import annotations

from contextlib import contextmanager

from comfy_paths import find_browser

CHROMIUM_FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@contextmanager
def open_browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=list(CHROMIUM_FLAGS))
        yield browser
        browser.close()


@contextmanager
def open_page(browser, url: str, viewport={"width": 1600, "height": 1000}):  # noqa: B006 (not changed)
    """The frontend without its first-visit dialog; page.console holds what the console said (type, text)."""
    context = browser.new_context(viewport=viewport)
    page = context.new_page()
    page.console = []
    page.on("console", lambda message: page.console.append((message.type, message.text)))
    page.on("pageerror", lambda error: page.console.append(("pageerror", str(error))))
    page.goto(url, wait_until="domcontentloaded")
    wait_until_ready(page)
    yield page
    context.close()


def wait_until_ready(page) -> None:
    page.wait_for_function("window.app && app.vueAppReady && app.extensionManager", timeout=60_000)
    page.wait_for_timeout(1500)
    page.keyboard.press("Escape")
