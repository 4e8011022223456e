"""Where ComfyUI, this repository and the browser are, and in one sentence what is missing."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SHIMS = Path(__file__).resolve().parent / "shims"
# enough of ComfyUI's requirements to tell whether they were installed in this Python
NEEDED = ("aiohttp", "torchsde", "torchvision", "torchaudio", "comfy_kitchen", "comfyui_frontend_package")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def find_comfyui() -> Path | None:
    """COMFYUI_PATH; when it is not set ~/comfy/ComfyUI, else the ComfyUI whose custom_nodes holds this repository."""
    named = os.environ.get("COMFYUI_PATH")
    places = [Path(named).expanduser()] if named else [Path.home() / "comfy" / "ComfyUI", REPOSITORY.parents[1]]
    found = (place.resolve() for place in places if (place / "main.py").is_file() and (place / "comfy").is_dir())
    return next(found, None)


def find_browser() -> str | None:
    """CHROMIUM, else the first of BROWSERS on PATH."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)


def missing_comfyui() -> str:
    root = find_comfyui()
    install = f"{sys.executable} tests/comfy/install_requirements.py"
    if root is None:
        place = os.environ.get("COMFYUI_PATH", "~/comfy/ComfyUI")
        return f"no ComfyUI at {place}: set COMFYUI_PATH to a checkout and run {install}"
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return f"{sys.executable} lacks {', '.join(missing)}: run {install}"
    return ""


def missing_browser() -> str:
    if importlib.util.find_spec("playwright") is None:
        return 'playwright is not installed: pip install -e ".[test]"'
    if find_browser() is None:
        return "no chromium on PATH: install it (Debian: apt-get install chromium) or set CHROMIUM to the executable"
    return ""
