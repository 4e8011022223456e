"""Fixtures for tests that run inside the real ComfyUI and in a real browser.

`comfy` is a client of one server for the whole session, `comfy_server` the server itself; `start_comfy` starts
further ones with flags of their own; `page` is the frontend in chromium, opened on the session's server. Where
ComfyUI or chromium is missing these tests are skipped, and the summary says so in red: a green run without them is
not a full run.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from comfy_paths import SHIMS, find_browser, find_comfyui, missing_browser, missing_comfyui

CHROMIUM_FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
_not_run: dict[str, int] = {}  # reason -> how many tests


def pytest_itemcollected(item):
    item.add_marker("comfyui")


def pytest_runtest_setup(item):
    reason = missing_comfyui()
    if not reason and "browser" in item.fixturenames:
        reason = missing_browser()
    if reason:
        _not_run[reason] = _not_run.get(reason, 0) + 1
        pytest.skip(reason)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter):
    """Below everything else that the summary says."""
    result = yield
    for reason, count in _not_run.items():
        noun = "test" if count == 1 else "tests"
        terminalreporter.write_line(f"NOT RUN: {count} real-ComfyUI {noun}: {reason}", red=True, bold=True)
    return result


@pytest.fixture(scope="session")
def comfy_server(tmp_path_factory):
    from comfy_server import ComfyServer

    with ComfyServer(tmp_path_factory.mktemp("comfyui")) as server:
        yield server


@pytest.fixture
def comfy(comfy_server):
    """A ComfyClient of the session's server; the messages of earlier tests are forgotten."""
    comfy_server.client.messages.clear()
    return comfy_server.client


@pytest.fixture
def start_comfy(tmp_path):
    """start_comfy("--bf16-unet") -> ComfyServer of this test alone, stopped at its end."""
    from comfy_server import ComfyServer

    servers = []

    def start(*flags):
        base = tmp_path / f"comfyui{len(servers)}"
        base.mkdir()
        servers.append(ComfyServer(base, *flags))
        return servers[-1].start()

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=list(CHROMIUM_FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def page(browser, comfy_server):
    """The frontend, ready and without its first-visit dialog; page.console holds what the console said (type, text)."""
    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    page = context.new_page()
    page.console = []
    page.on("console", lambda message: page.console.append((message.type, message.text)))
    page.on("pageerror", lambda error: page.console.append(("pageerror", str(error))))
    page.goto(comfy_server.url, wait_until="domcontentloaded")
    page.wait_for_function("window.app && app.vueAppReady && app.extensionManager", timeout=60_000)
    page.wait_for_timeout(1500)
    page.keyboard.press("Escape")
    yield page
    context.close()


@pytest.fixture(scope="session")
def comfy_modules():
    """Makes `import comfy...` work in the test process itself, on the CPU, for tests of one function of an adapter."""
    for path in (str(find_comfyui()), str(SHIMS)):
        if path not in sys.path:
            sys.path.insert(0, path)
    import cpu_wheels

    cpu_wheels.install()
    from comfy.cli_args import args

    args.cpu = True
    return Path(find_comfyui())
