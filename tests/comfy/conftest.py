"""Fixtures for tests that run inside the real ComfyUI and in a real browser.

`comfy` is a client of one server for the whole session, `comfy_server` the server itself; `start_comfy` starts
further ones with flags of their own; `page` is the frontend in chromium, opened on the session's server, and
`same_page` is one for all tests of a file. Where ComfyUI or chromium is missing these tests are skipped, and the
summary says so in red: a green run without them is not a full run. It also says which version ran, and which others
are here and did not.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections import Counter
from pathlib import Path

import pytest

from comfy_browser import open_browser, open_page
from comfy_paths import SHIMS, find_comfyui, missing_browser, missing_comfyui, other_comfyuis, version

NOT_RUN = "not run"  # the user property that says why


def pytest_itemcollected(item):
    item.add_marker("comfyui")


def pytest_runtest_setup(item):
    reason = missing_comfyui()
    if not reason and "browser" in item.fixturenames:
        reason = missing_browser()
    if reason:
        # a property travels with the report, also from a worker of pytest-xdist
        item.user_properties.append((NOT_RUN, reason))
        pytest.skip(reason)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter):
    """Below everything else that the summary says."""
    result = yield
    reports = [report for kind in ("passed", "failed", "skipped") for report in terminalreporter.stats.get(kind, ())]
    reasons = Counter(value for report in reports for name, value in getattr(report, "user_properties", ()) if name == NOT_RUN)
    for reason, count in reasons.items():
        noun = "test" if count == 1 else "tests"
        terminalreporter.write_line(f"NOT RUN: {count} real-ComfyUI {noun}: {reason}", red=True, bold=True)
    if not missing_comfyui():
        terminalreporter.write_line(f"real ComfyUI: {version(find_comfyui())} at {find_comfyui()}, frontend {frontend_version()}")
        for reason in other_comfyuis():
            terminalreporter.write_line(f"NOT RUN: {reason}", red=True, bold=True)
    return result


def frontend_version() -> str:
    return importlib.metadata.version("comfyui-frontend-package")


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
def tiny_model(comfy_server):
    """The server lists the tiny model: the one that ships, else random weights of its shape in the server's own models."""
    import torch
    from safetensors.torch import save_file

    from comfyui_qvg.qvg.demo import METADATA, NETWORK_FILE, NETWORK_PATH, TEXT_DIM, VAE_FILE
    from comfyui_qvg.qvg.models.wan import CausalWan, WanSizes
    from comfyui_qvg.qvg.models.wan_vae import WanVAE

    if NETWORK_PATH.is_file():
        return
    draw = torch.Generator().manual_seed(0)
    for module, scale, folder, name in (
            (CausalWan(WanSizes(256, 1024, 6, TEXT_DIM)), 0.05, "diffusion_models", NETWORK_FILE), (WanVAE(8), 0.1, "vae", VAE_FILE)):
        state = {key: (scale * torch.randn(value.shape, generator=draw)).bfloat16() for key, value in module.state_dict().items()}
        save_file(state, comfy_server.folder("models", folder) / name, metadata=METADATA)


@pytest.fixture(scope="session")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture
def page(browser, comfy_server):
    """The frontend, ready and without its first-visit dialog; page.console holds what the console said (type, text)."""
    with open_page(browser, comfy_server.url) as page:
        yield page


@pytest.fixture(scope="module")
def _page_of_this_file(browser, comfy_server):
    with open_page(browser, comfy_server.url) as page:
        yield page


@pytest.fixture
def same_page(_page_of_this_file):
    """One page for the tests of a file that load a graph of their own and leave no dialog open: to open one takes six seconds of CPU."""
    _page_of_this_file.console.clear()
    return _page_of_this_file


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
