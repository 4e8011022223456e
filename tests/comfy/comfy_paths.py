"""Which ComfyUIs are here, which of them this Python can run, where the browser is, and in one sentence what is missing.

COMFYUI_PATH names checkouts, several with os.pathsep between them; when it is not set they are ~/comfy/ComfyUI and
~/comfy/ComfyUI-*, else the ComfyUI whose custom_nodes holds this repository. One Python holds the requirements of one
ComfyUI, so a run of pytest uses the first checkout whose requirements it has; `every_version.py` runs pytest for each.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re
import shutil
import sys
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

REPOSITORY = Path(__file__).resolve().parents[2]
SHIMS = Path(__file__).resolve().parent / "shims"
# people update the frontend by itself, so what a core release pins is the oldest that it takes
UPDATED_ALONE = "comfyui-frontend-package"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def checkouts() -> list[Path]:
    named = os.environ.get("COMFYUI_PATH")
    if named:
        places = [Path(part).expanduser() for part in named.split(os.pathsep) if part]
    else:
        home = Path.home() / "comfy"
        places = [home / "ComfyUI", *sorted(home.glob("ComfyUI-*"))]
    found = [place.resolve() for place in places if _is_comfyui(place)]
    return list(dict.fromkeys(found)) or ([REPOSITORY.parents[1]] if not named and _is_comfyui(REPOSITORY.parents[1]) else [])


def _is_comfyui(place: Path) -> bool:
    return (place / "main.py").is_file() and (place / "comfy").is_dir()


@functools.cache
def find_comfyui() -> Path | None:
    """The first checkout whose requirements this Python has; the first of all when there is none such."""
    found = checkouts()
    return next((root for root in found if not unmet(root)), found[0] if found else None)


def version(root: Path) -> str:
    file = root / "comfyui_version.py"
    match = re.search(r'__version__ = "(.+?)"', file.read_text()) if file.is_file() else None
    return match[1] if match else "of unknown version"


def requirements(root: Path) -> list[Requirement]:
    found = []
    for line in (root / "requirements.txt").read_text().splitlines():
        try:
            found.append(Requirement(line.partition("#")[0].strip()))
        except InvalidRequirement:  # an empty line, or an option of pip
            continue
    return [one for one in found if one.marker is None or one.marker.evaluate()]


@functools.cache
def unmet(root: Path) -> list[str]:
    """What ComfyUI's requirements.txt asks for and this Python does not have, as that file words it."""
    lacking = []
    for one in requirements(root):
        try:
            installed = importlib.metadata.version(one.name)
        except importlib.metadata.PackageNotFoundError:
            lacking.append(f"{one.name}{one.specifier}")
            continue
        wanted = str(one.specifier)
        if one.name == UPDATED_ALONE:
            one = Requirement(f"{one.name}{wanted.replace('==', '>=')}")
        if not one.specifier.contains(installed, prereleases=True):
            lacking.append(f"{one.name}{wanted} (found {installed})")
    return lacking


def missing_comfyui() -> str:
    root = find_comfyui()
    install = f"{sys.executable} tests/comfy/install_requirements.py"
    if root is None:
        place = os.environ.get("COMFYUI_PATH", "~/comfy/ComfyUI")
        return f"no ComfyUI at {place}: set COMFYUI_PATH to a checkout and run {install}"
    return _lacks(root, f"run {install}") if unmet(root) else ""


def other_comfyuis() -> list[str]:
    """A sentence for each checkout that a run of this Python leaves out."""
    run = f"{sys.executable} tests/comfy/every_version.py runs them on each version"
    return [_lacks(root, run) if unmet(root) else f"another run takes ComfyUI {version(root)} at {root}: {run}"
            for root in checkouts() if root != find_comfyui()]


def _lacks(root: Path, what_to_do: str) -> str:
    lacking = unmet(root)
    named = ", ".join(lacking[:3]) + (f" and {len(lacking) - 3} more" if len(lacking) > 3 else "")
    return f"{sys.executable} lacks what ComfyUI {version(root)} at {root} asks for, {named}: {what_to_do}"


def find_browser() -> str | None:
    """CHROMIUM, else the first of BROWSERS on PATH, else the one that `playwright install chromium` fetched."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None) or _playwrights_own()


@functools.cache
def _playwrights_own() -> str | None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).is_file() else None


@functools.cache
def missing_browser() -> str:
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return f'{sys.executable} lacks playwright: run {sys.executable} -m pip install -e ".[test]"'
    found = find_browser()
    if found is None:
        return ("no chromium on PATH: install it (Debian: apt-get install chromium; elsewhere: "
                f"{sys.executable} -m playwright install chromium) or set CHROMIUM to the executable")
    if not Path(found).is_file():
        return f"CHROMIUM names {found}, which is no file: set it to the executable of chromium, or unset it"
    return ""
